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
    """GPT-2 124M: plain, recomputing all or a part, in micro-batches; and a llama with Muon."""
    found = json.loads(script_output(library, "peak_memory.py"))
    assert len(found) == 7
    for name, bytes_ in found.items():
        assert bytes_["predicted"] == pytest.approx(bytes_["allocated"], rel=0.05), name


def test_packed_rows_need_no_mask(library: Path):
    """Two blocks, two micro-batches; llama's key heads are fewer than its query heads."""
    found = json.loads(script_output(library, "packed.py"))
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
    # the block, the last norm, the loss
    assert found["llama, selective, compiled"]["compilations"] == 3


def test_decoding_plans_no_attention(library: Path):
    """cuDNN makes a plan for each length, and each token has another one."""
    found = json.loads(script_output(library, "decode.py"))
    assert found.pop("by itself") == ["_scaled_dot_product_cudnn_attention"]
    assert len(found) == 6
    for name, kernels in found.items():
        assert kernels, name
        assert not any("cudnn" in kernel for kernel in kernels), (name, kernels)
