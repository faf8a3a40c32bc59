from pathlib import Path

import pytest
import torch

from tests.nullgpu.build import build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The null GPU."""
    if torch.version.cuda is None:
        pytest.skip("needs torch's CUDA wheel: make nullgpu")
    return build(tmp_path_factory.mktemp("nullgpu"))
