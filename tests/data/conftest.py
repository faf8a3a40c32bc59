"""What the tests of the data layer share."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def quick() -> Iterator[Path]:
    """A directory in memory where there is one: these tests flush files thousands of times."""
    memory = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(dir=memory if memory.is_dir() else None))
    yield path
    shutil.rmtree(path, ignore_errors=True)
