"""torch's CUDA path on a GPU that computes nothing, see build.py: ``make nullgpu``."""

import json
from pathlib import Path

import pytest

from tests.nullgpu.process import script_output


def test_saves_hold_what_was_in_memory(library: Path, tmp_path: Path):
    """Copies to pinned memory arrive only when their own stream is waited for."""
    printed = script_output(library, "save.py", tmp_path, NULLGPU_DEVICES="2", NULLGPU_LATE="1")
    found = json.loads(printed)
    assert len(found) == 4
    assert set(found.values()) == {0}, found


def test_the_doctor_sees_gpus(library: Path):
    printed = script_output(library, "hardware.py", NULLGPU_DEVICES="2")
    found = {each["what"]: each for each in json.loads(printed)}
    for name in ("GPU 0", "GPU 1"):
        assert found[name]["state"] == "ok"
        assert "H100 80GB HBM3, 85.0 GB of 85.0 GB free, 989 TFLOP/s" in found[name]["found"]
    assert found["NCCL"]["found"].split(".")[0] == "2"
    assert (found["bf16"]["state"], found["bf16"]["found"]) == ("ok", "yes")


def test_memory_is_as_predicted(library: Path):
    """GPT-2 124M: plain, recomputing, in micro-batches; and a llama with Muon."""
    found = json.loads(script_output(library, "peak_memory.py"))
    assert len(found) == 5
    for name, bytes_ in found.items():
        assert bytes_["predicted"] == pytest.approx(bytes_["allocated"], rel=0.05), name
