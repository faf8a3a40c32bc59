"""scripts/gpu_check.sh runs through on the null GPU, and writes what it has found as it goes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import ROOT

NAME = "gpu-nvidia-h100-80gb-hbm3"


def start(library: Path, out: Path, *arguments: str) -> "subprocess.Popen[str]":
    variables = {
        "PYTHON": sys.executable,
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "NULLGPU_TRUE": "1",
        "GPU_CHECK_CUDNN": "0",
    }
    return subprocess.Popen(
        [ROOT / "scripts/gpu_check.sh", "--small", "--out", out, *arguments],
        env=os.environ | variables, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def results(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / f"{NAME}.json").read_text())
    return found


def test_parts_leave_their_results(library: Path, tmp_path: Path):
    process = start(library, tmp_path, "--only", "sampling", "--only", "ranks")
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    found = results(tmp_path)
    assert found["device"] == "NVIDIA H100 80GB HBM3"
    assert list(found["parts"]) == ["sampling", "ranks"]
    sampled = found["parts"]["sampling"]["gpt2"]["result"]
    assert sampled["batch 16"]["tokens_per_second"] > 0
    assert found["parts"]["ranks"]["all"] == {"skipped": "there is one GPU"}
    assert "bench_decode.py" in (tmp_path / f"{NAME}.log").read_text()


def test_a_killed_check_leaves_what_it_had(library: Path, tmp_path: Path):
    process = start(library, tmp_path, "--only", "machine")
    while not (tmp_path / f"{NAME}.json").exists():
        assert process.poll() is None
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert results(tmp_path)["parts"]["machine"]


def test_a_part_ends_at_its_limit(library: Path, tmp_path: Path):
    """11 s are enough for some of the 8 commands of ``steps``, which begin by importing torch."""
    process = start(library, tmp_path, "--only", "steps", "--only", "sampling", "--minutes", "0.18")
    printed, _ = process.communicate()
    assert process.returncode == 1
    found = results(tmp_path)["parts"]
    assert found["steps"]["stopped"] == "its time was up"
    assert found["steps"]["part_seconds"] < 60
    assert found["sampling"] == {"skipped": "no time was left"}
    assert "steps FAILED" in printed


@pytest.mark.slow
def test_the_whole_check(library: Path, tmp_path: Path):
    """Minutes. The tests of tests/gpu are left out: they look at numbers."""
    parts = ("machine", "steps", "pretrain", "resume", "sampling", "ranks")
    process = start(library, tmp_path, *(f"--only={each}" for each in parts))
    printed, _ = process.communicate()
    found = results(tmp_path)["parts"]
    assert list(found) == list(parts)
    assert len(found["steps"]) == 8 + 1  # and its seconds
    for each in found["steps"].values():
        if isinstance(each, dict):
            assert each["result"]["attention"], each
    compared = found["pretrain"]["compared"]
    assert compared["peak_memory_bytes"] > 0
    assert compared["planned_memory_bytes"] > 0
    # The host reads old bytes as losses; the tensors are those of the seed.
    assert "FAILED: resume;" in printed
    assert found["resume"]["killed"]["ok"]
    assert found["resume"]["compared"]["tensors"] > 50
    assert found["resume"]["compared"]["different_tensors"] == []
