"""scripts/gpu_check.sh, as far as a machine without a GPU shows it; see also tests/nullgpu."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.processes import ROOT, environment

PARTS = ["machine", "tests", "steps", "pretrain", "resume", "sampling", "ranks"]


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "scripts/gpu_check.sh", *map(str, arguments)], capture_output=True, text=True,
        env=os.environ | {"PYTHON": sys.executable},
    )  # fmt: skip


def test_the_parts_are_listed():
    done = check("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == PARTS


def test_an_unknown_part_is_refused():
    done = check("--only", "everything")
    assert done.returncode == 2
    assert "'everything'" in done.stderr.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_refused(tmp_path: Path):
    done = check("--out", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu_check: torch finds no CUDA GPU here\n"
    assert not list(tmp_path.iterdir())


def test_results_of_an_earlier_check_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    new_file = importlib.import_module("gpu_check").new_file
    # A check that was killed before its first result has left only a log.
    for name, left in (("gpu-h200", ".json"), ("gpu-h200-2", ".log"), ("gpu-h200-3", ".json")):
        assert new_file(tmp_path, "gpu-h200") == tmp_path / f"{name}.json"
        (tmp_path / f"{name}{left}").touch()


def test_the_standard_library_is_tokenized_without_datasets(tmp_path: Path):
    """The image of a GPU machine may lack it; processes of the command inherit the obstacle."""
    (tmp_path / "datasets.py").write_text("raise ImportError('datasets is not here')\n")
    variables = environment()
    variables["PYTHONPATH"] = f"{tmp_path}:{variables['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "minigpt_cli", "tokenize", "python-stdlib", "--vocab-size",
         "300", "--out", tmp_path / "data", "--workers", "2"],
        env=variables, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "data/dataset.json").read_text())
    assert manifest["splits"]["train"]["tokens"] > 10_000
