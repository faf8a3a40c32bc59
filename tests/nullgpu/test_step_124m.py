"""What a step of GPT-2 124M and its loss ask of a GPU: exact budgets, for torch 2.14.1."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.processes import ROOT
from tests.nullgpu.build import build

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="needs torch's CUDA wheel")

# launches of torch's kernels, launches of compiled kernels, matrix products, peak bytes
BUDGETS = {
    "plain": (718, 0, 168, 15_166_959_616),
    "recomputing": (898, 0, 204, 5_486_362_624),
    "micro-batches": (2851, 0, 600, 7_281_572_352),
    "muon": (802, 0, 228, 14_832_570_880),
    "compiled": (189, 334, 168, 13_332_457_472),
    "deterministic": (730, 0, 168, 15_173_906_432),
    "deterministic, compiled": (201, 334, 168, 13_332_457_472),
    "loss, eager": (125, 0, 24, 2_600_812_544),
    "loss, eager, deterministic": (125, 0, 24, 2_600_812_544),
    "loss, compiled": (21, 8, 24, 1_365_606_400),
    "loss, compiled, deterministic": (21, 8, 24, 1_365_606_400),
}


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    library = build(tmp_path_factory.mktemp("nullgpu"))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("step_124m.py")],
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "LD_PRELOAD": str(library),
            "TRITON_LIBCUDA_PATH": str(library.parent),
        },
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_launches_products_and_memory(counted: dict[str, dict[str, int]]):
    fields = ("kernels", "triton", "products", "peak")
    assert {name: tuple(each[f] for f in fields) for name, each in counted.items()} == BUDGETS


def test_nothing_waits(counted: dict[str, dict[str, int]]):
    assert {each["waits"] for each in counted.values()} == {0}


def test_a_compiled_step_has_few_launches(counted: dict[str, dict[str, int]]):
    for name in ("compiled", "deterministic, compiled"):
        assert counted[name]["kernels"] + counted[name]["triton"] <= 700
        loss = counted["loss, " + ", ".join(reversed(name.split(", ")))]
        assert loss["kernels"] + loss["triton"] + loss["products"] <= 60
