"""What the doctor finds on real and on broken machines."""

import os
import shutil
import subprocess
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minigpt_cli.analysis.compiler import compiler_finding, trial_compilation
from minigpt_cli.analysis.disk_speed import disk_finding, measure_disk
from minigpt_cli.analysis.doctor import diagnose
from minigpt_cli.analysis.finding import Finding
from minigpt_cli.analysis.hardware import hardware_findings, threads_finding
from minigpt_cli.analysis.software import DEVELOPMENT, PURPOSES, software_findings
from tests.helpers.processes import ROOT


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {each.what: each for each in findings}


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_a_real_compilation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with trial_compilation() as trial:
        found = compiler_finding(trial, 1000)
    assert (found.state, found.found) == ("ok", "torch.compile works")
    assert list(tmp_path.iterdir()) == []


def test_a_compilation_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with trial_compilation() as trial:
        assert not isinstance(trial, OSError)
        found = compiler_finding(trial, 0.01)
    assert (found.state, found.found) == ("lacks", "torch.compile took longer than 0.01 s")
    assert trial.process.returncode == -9
    assert list(tmp_path.iterdir()) == []


def test_no_directory_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    with trial_compilation() as trial:
        found = compiler_finding(trial)
    assert found.state == "lacks"
    assert "No such file or directory" in found.found
    assert found.mend == "export TMPDIR=DIR"


def test_disk(tmp_path: Path):
    found = disk_finding(tmp_path)
    assert found.state == "ok", found
    assert "free, writes " in found.found
    assert list(tmp_path.iterdir()) == []
    missing = disk_finding(tmp_path / "gone")
    assert (missing.state, missing.found) == (
        "lacks", "can't be written to: No such file or directory"
    )  # fmt: skip


def test_speed_is_of_the_bytes_and_of_the_time(tmp_path: Path):
    start = time.perf_counter()
    speed = measure_disk(tmp_path, 16 << 20)
    seconds = time.perf_counter() - start
    assert speed.write > (8 << 20) / seconds
    assert speed.read > (8 << 20) / seconds


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
@pytest.mark.parametrize(
    ("options", "part"), [("size=900k", "almost full: 0.9 MB free"), ("ro", "Read-only")]
)
def test_a_disk_that_is_of_no_use(tmp_path: Path, options: str, part: str):
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", tmp_path]).returncode:
        pytest.skip("no permission to mount")
    try:
        found = disk_finding(tmp_path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert found.state == "lacks"
    assert part in found.found
    assert found.mend


@pytest.fixture
def metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Finding]]:
    """``metadata("torch>=2.11", ...)`` -> the findings where minigpt needs these."""

    def find(*requirements: str) -> dict[str, Finding]:
        folder = tmp_path / "minigpt_cli-9.dist-info"
        folder.mkdir()
        extras = ["dev", *PURPOSES]
        (folder / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: minigpt-cli\nVersion: 9\n"
            + "".join(f"Provides-Extra: {extra}\n" for extra in extras)
            + "".join(f"Requires-Dist: {each}\n" for each in requirements)
        )
        monkeypatch.syspath_prepend(tmp_path)
        return by_name(software_findings())

    return find


def test_what_is_missing_and_too_old(metadata: Callable[..., dict[str, Finding]]):
    found = metadata(
        "numpy>=1.26", "torch>=99", "nosuchcore", 'nosuchplot[x]>=3.8; extra == "plot"',
        'rich>=1; extra == "eval"', 'transformers>=4; extra == "dev"', 'nosuchtest; extra == "dev"',
        'nosuchplot>=3.8; extra == "eval"', "plotext>=99",
    )  # fmt: skip
    assert found["torch"].state == "broken"
    assert found["torch"].found == f"{torch.__version__}, needed: >=99"
    assert found["torch"].mend.endswith("pip install --upgrade 'torch>=99'")
    assert (found["nosuchcore"].state, found["nosuchcore"].found) == ("broken", "not installed")
    assert (found["plotext"].state, found["plotext"].purpose) == ("lacks", "curves in the terminal")
    assert found["packages"].found.startswith("numpy ")
    assert found["nosuchplot"].state == "lacks"
    assert found["nosuchplot"].purpose == "minigpt report --png; minigpt eval --tasks"
    assert found["nosuchplot"].mend.endswith("pip install 'nosuchplot>=3.8'")
    assert (found["rich"].state, found["rich"].purpose) == ("ok", "minigpt eval --tasks")
    assert found["transformers"].state == "ok"
    assert "nosuchtest" not in found


def test_torch_that_is_too_old_is_not_asked(
    metadata: Callable[..., dict[str, Finding]], tmp_path: Path
):
    metadata("torch>=99")
    findings = diagnose(tmp_path)
    assert [each.state for each in findings if each.what == "torch"] == ["broken"]
    assert not {"bf16", "compiler"} & by_name(findings).keys()


def test_each_extra_has_a_purpose():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert set(extras) - set(DEVELOPMENT) <= set(PURPOSES)


@pytest.mark.parametrize(
    ("threads", "cores", "limit", "variable", "mend"),
    [
        (2, 2, None, None, ""),
        (64, 64, 4.0, None, "export OMP_NUM_THREADS=4"),
        (64, 64, 1.5, "64", "export OMP_NUM_THREADS=2"),
        (4, 2, None, "4", "export OMP_NUM_THREADS=2"),
        (32, 64, None, None, ""),  # one for each two hyperthreads
        (1, 16, None, "1", "unset OMP_NUM_THREADS"),
        (1, 16, 1.0, "1", ""),
    ],
)
def test_threads(
    threads: int, cores: int, limit: float | None, variable: str | None, mend: str,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    found = threads_finding(threads, cores, limit)
    assert found.mend == mend
    assert (found.state == "ok") == (not mend)


def test_this_machine():
    found = by_name(hardware_findings())
    assert f"torch uses {torch.get_num_threads()} on " in found["threads"].found
    assert "GPU 0" in found if torch.cuda.is_available() else "GPU" in found
    assert {"bf16", "memory", "open files"} <= found.keys()
    assert all(each.state != "broken" for each in found.values())
