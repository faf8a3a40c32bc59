"""scripts/slurm/pretrain.sbatch without Slurm: srun and scontrol only note their arguments."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

SBATCH = ROOT / "scripts/slurm/pretrain.sbatch"


def sbatch(folder: Path, code: int, **variables: str) -> tuple[int, list[str]]:
    """Run the script where srun ends with ``code``; return its own code and the commands it ran."""
    for name, end in (("srun", code), ("scontrol", 0)):
        (folder / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/ran\nexit {end}\n')
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_CPUS_ON_NODE": "2"}
    done = subprocess.run(
        ["bash", SBATCH, "r.toml", "runs/r", "--set", "train.steps=5"], cwd=folder,
        env=job | {"PATH": f"{folder}:{os.environ['PATH']}"} | variables,
    )  # fmt: skip
    return done.returncode, (folder / "ran").read_text().splitlines()


def test_arguments(tmp_path: Path):
    (tmp_path / "gpus").mkdir()
    for folder, ranks, variables in (
        (tmp_path, 2, {}),
        (tmp_path / "gpus", 8, {"SLURM_GPUS_ON_NODE": "8"}),
    ):
        assert sbatch(folder, 0, **variables) == (0, [
            f"srun --ntasks={4 * ranks} --ntasks-per-node={ranks} --kill-on-bad-exit=0 --wait=60 "
            "--cpu-bind=none minigpt resume runs/r --or-start r.toml --set train.steps=5"
        ])  # fmt: skip


@pytest.mark.parametrize(
    ("code", "restarts", "requeues"),
    [(75, None, True), (75, "99", True), (75, "100", False), (2, None, False), (137, "1", False)],
)
def test_requeue(tmp_path: Path, code: int, restarts: str | None, requeues: bool):
    count = {} if restarts is None else {"SLURM_RESTART_COUNT": restarts}
    end, (_, *rest) = sbatch(tmp_path, code, **count)
    assert end == code
    assert rest == (["scontrol requeue 7"] if requeues else [])
