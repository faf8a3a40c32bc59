"""torch's CUDA path on a GPU that computes nothing, see build.py: ``make nullgpu``."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.processes import ROOT
from tests.nullgpu.build import build

pytestmark = pytest.mark.skipif(torch.version.cuda is None, reason="needs torch's CUDA wheel")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("nullgpu"))


def run(library: Path, script: str, *arguments: object, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "tests/nullgpu" / script, *map(str, arguments)],
        env=os.environ
        | {"TRITON_LIBCUDA_PATH": str(library.parent)}
        # The null GPU has no virtual addresses.
        | {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}
        | {"PYTHONPATH": str(ROOT), "LD_PRELOAD": str(library)} | variables,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_saves_hold_what_was_in_memory(library: Path, tmp_path: Path):
    """Copies to pinned memory arrive only when their own stream is waited for."""
    found = json.loads(run(library, "save.py", tmp_path, NULLGPU_DEVICES="2", NULLGPU_LATE="1"))
    assert len(found) == 4
    assert set(found.values()) == {0}, found


def test_the_doctor_sees_gpus(library: Path):
    printed = run(library, "hardware.py", NULLGPU_DEVICES="2")
    found = {each["what"]: each for each in json.loads(printed)}
    for name in ("GPU 0", "GPU 1"):
        assert found[name]["state"] == "ok"
        assert "H100 80GB HBM3, 85.0 GB of 85.0 GB free, 989 TFLOP/s" in found[name]["found"]
    assert found["NCCL"]["found"].split(".")[0] == "2"
    assert (found["bf16"]["state"], found["bf16"]["found"]) == ("ok", "yes")


def test_memory_is_as_predicted(library: Path):
    """GPT-2 124M: plain, recomputing all or a part, in micro-batches; and a llama with Muon."""
    found = json.loads(run(library, "peak_memory.py"))
    assert len(found) == 7
    for name, bytes_ in found.items():
        assert bytes_["predicted"] == pytest.approx(bytes_["allocated"], rel=0.05), name


def packed(library: Path, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(library, "packed.py", *arguments))
    assert found["waits"] == 0
    return found


def test_packed_rows_need_no_mask(library: Path):
    """Two blocks, two micro-batches; llama's key heads are fewer than its query heads."""
    for family, products in (("gpt2", 54), ("llama", 90)):
        plain = packed(library, family)
        assert (plain["flash_forward"], plain["flash_backward"]) == (4, 4)
        assert plain["with_mask"] == 0
        kept = packed(library, family, "train.activation_checkpointing=selective")
        assert (kept["flash_forward"], kept["with_mask"]) == (4, 0)
        assert kept["products"] == plain["products"] == products
        assert kept["bytes"] < plain["bytes"]
    compiled = packed(
        library, "llama", "train.activation_checkpointing=selective", "precision.compile=true"
    )
    assert compiled["compilations"] == 1  # with other numbers of segments, too
    assert (compiled["flash_forward"], compiled["products"]) == (4, 90)
    again = packed(library, "gpt2", "train.activation_checkpointing=true")
    assert again["flash_forward"] == 8
    assert again["products"] == 54 + 4 * 3  # a block's last product isn't needed


@pytest.mark.parametrize("setting", ["precision.dtype=fp32", "model.dropout=0.1"])
def test_packed_rows_that_need_a_mask(library: Path, setting: str):
    found = packed(library, "gpt2", setting)
    assert (found["flash_forward"], found["flash_backward"], found["with_mask"]) == (0, 0, 8)
