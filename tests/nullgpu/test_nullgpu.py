"""torch's CUDA path on a GPU that computes nothing, see build.py: ``make nullgpu``."""

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


def test_packed_rows_need_no_mask(library: Path):
    """Two blocks, two micro-batches; llama's key heads are fewer than its query heads."""
    found = json.loads(run(library, "packed.py"))
    assert {name for name, way in found.items() if way["waits"]} == set()
    launched = {
        name: (way["flash_forward"], way["flash_backward"], way["with_mask"])
        for name, way in found.items()
    }
    assert launched == {
        "gpt2": (4, 4, 0),
        "gpt2, selective": (4, 4, 0),
        "gpt2, recomputing": (8, 4, 0),
        "llama": (4, 4, 0),
        "llama, selective": (4, 4, 0),
        "llama, selective, compiled": (4, 4, 0),
        "fp32": (0, 0, 8),
        "dropout": (0, 0, 8),
    }
    products = {name: way["products"] for name, way in found.items()}
    assert products["gpt2"] == products["gpt2, selective"]
    assert products["llama"] == products["llama, selective"]
    assert products["llama"] == products["llama, selective, compiled"]
    # A block's last product isn't needed again.
    assert products["gpt2, recomputing"] == products["gpt2"] + 4 * 3
    assert found["gpt2, selective"]["bytes"] < found["gpt2"]["bytes"]
    # With other numbers of segments, too
    assert found["llama, selective, compiled"]["compilations"] == 1
