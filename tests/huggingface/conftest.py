"""Random models of transformers in directories, as a user would download them."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.models import SHAPES, saved_model


@pytest.fixture(scope="session", params=SHAPES)
def theirs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, license_dataset: Path
) -> tuple[Any, Path]:
    """(model, directory) of each shape, as transformers saves it, with a tokenizer."""
    return saved_model(request.param, tmp_path_factory.mktemp(request.param), license_dataset)
