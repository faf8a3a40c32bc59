from pathlib import Path

import pytest

from tests.helpers.commands import finished
from tests.helpers.recipes import TINY


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """A finished run under runs/tiny of a working directory."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "tiny.toml").write_text(TINY.format(data=dataset))
    finished("pretrain", "tiny.toml", cwd=folder)
    return folder / "runs/tiny"
