"""scripts/slurm/pretrain.sbatch, and plain srun, under a real Slurm: its nodes are this machine.

Two nodes with one core each, and one with two cores in a partition of its own.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, command, environment
from tests.helpers.ranks import free_port
from tests.helpers.recipes import TINY
from tests.helpers.runs import assert_same_run, steps_logged
from tests.helpers.waiting import wait_until

SBATCH = ROOT / "scripts/slurm/pretrain.sbatch"
STEPS = 400
SETTINGS = ("--set", f"train.steps={STEPS}", "--set", "eval.every_steps=200",
            "--set", "checkpoint.every_steps=1000", "--set", "precision.dtype=fp32")  # fmt: skip
OPTIONS = ("--kill-on-bad-exit=0", "--wait=60", "--cpu-bind=none")  # as docs/cluster.md tells

PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0
    or not all(shutil.which(name, path=PATH) for name in ("slurmctld", "slurmd", "sbatch")),
    reason="needs Slurm (apt-get install slurm-wlm) and root to start it",
)

# The first node is called like this machine, so that its name can be looked up, as on a cluster.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=sched_interval=1
MpiDefault=none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdParameters=config_overrides
KillWait=60
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName={host}-2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
NodeName={host}-3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=2
PartitionName=main Nodes={host},{host}-2 Default=YES MaxTime=INFINITE State=UP
PartitionName=wide Nodes={host}-3 MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster, and the directory that jobs are submitted from."""

    folder: Path
    env: dict[str, str]

    def __call__(self, *arguments: object) -> str:
        done = subprocess.run(
            list(map(str, arguments)), cwd=self.folder, env=self.env, capture_output=True,
            text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *arguments: object, nodes: int = 2) -> str:
        where = ("--nodes=2",) if nodes == 2 else ("--nodes=1", "--partition=wide")
        return self("sbatch", "--parsable", *where, SBATCH, *arguments).strip()

    def job(self, number: str) -> dict[str, str]:
        """JobState, ExitCode, Restarts and so on."""
        shown = self("scontrol", "--oneliner", "show", "job", number).split()
        return dict(field.split("=", 1) for field in shown if "=" in field)

    def log(self, number: str) -> str:
        return (self.folder / f"minigpt-{number}.log").read_text()

    def wait_for_end(self, number: str) -> dict[str, str]:
        wait_until(
            lambda: self.job(number)["JobState"] not in ("PENDING", "RUNNING", "COMPLETING"),
            explain=lambda: f"{self.job(number)}\n{self.log(number)}",
            seconds=240,
        )
        return self.job(number)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    host = socket.gethostname().partition(".")[0]
    ports = [free_port() for _ in range(4)]
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, ports=ports))
    (folder / "state").mkdir()
    (folder / "bin").mkdir()
    minigpt = folder / "bin/minigpt"
    minigpt.write_text(f'#!/bin/sh\nexec {sys.executable} -m minigpt_cli "$@"\n')
    minigpt.chmod(0o755)
    env = environment() | {
        "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{folder}/bin:{PATH}",
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    cluster = Slurm(folder, env)
    log = folder / "daemons.log"
    daemons = []
    try:
        nodes = (host, f"{host}-2", f"{host}-3")
        for daemon in (["slurmctld"], *(["slurmd", "-N", node] for node in nodes)):
            file = shutil.which(daemon[0], path=PATH)
            assert file is not None
            with log.open("a") as output:
                started = [file, "-D", *daemon[1:]]
                daemons.append(subprocess.Popen(started, env=env, stdout=output, stderr=output))
        wait_until(lambda: nodes_are_idle(cluster), explain=log.read_text, seconds=240)
        yield cluster
        cluster("scancel", "--user=root", "--signal=KILL")
        wait_until(lambda: not cluster("squeue", "--noheader"), explain=log.read_text, seconds=240)
    finally:
        for process in daemons:
            process.terminate()
        for process in daemons:
            process.wait(timeout=60)


def nodes_are_idle(slurm: Slurm) -> bool:
    shown = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--format=%T"], env=slurm.env, capture_output=True,
        text=True, timeout=240,
    )  # fmt: skip
    return shown.stdout.split() == ["idle"] * 3


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny.toml"
    file.write_text(TINY.format(data=dataset))
    return file


@pytest.fixture(scope="module")
def straight(slurm: Slurm, recipe: Path) -> Path:
    """The run that nothing happened to, on two processes without Slurm."""
    run = slurm.folder / "straight"
    arguments = command("pretrain", recipe, "--out", run, *SETTINGS, "--nproc", 2)
    slurm(*arguments)
    return run


def assert_two_ranks(run: Path) -> None:
    assert json.loads((run / "environment.json").read_text())["ranks"] == 2


def test_signalled_job_requeues_itself(slurm: Slurm, recipe: Path, straight: Path):
    run = slurm.folder / "requeued"
    job = slurm.submit(recipe, run, *SETTINGS)
    wait_until(lambda: steps_logged(run) > 3, explain=lambda: slurm.log(job))
    slurm("scancel", "--signal=USR1", job)  # as --signal does before the time limit
    wait_until(
        lambda: slurm.job(job)["JobState"] == "PENDING" and slurm.job(job)["Restarts"] == "1",
        explain=lambda: f"{slurm.job(job)}\n{slurm.log(job)}",
        seconds=240,
    )
    # Else in two minutes; at once would be too soon for slurmd, whose credentials count in seconds.
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now+3")
    end = slurm.wait_for_end(job)
    log = slurm.log(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("COMPLETED", "0:0", "1"), log
    stopped = re.search(rf"stopped by SIGUSR1 at step (\d+) of {STEPS}, everything is saved", log)
    assert stopped, log
    assert int(stopped[1]) < STEPS
    assert f"from step {stopped[1]} of {STEPS}" in log
    assert log.count(f"finished at step {STEPS}") == 1
    assert_two_ranks(run)
    assert_same_run(straight, run, STEPS)


def test_a_cancelled_job_saves_and_does_not_come_back(slurm: Slurm, recipe: Path):
    run = slurm.folder / "cancelled"
    job = slurm.submit(recipe, run, *SETTINGS, "--set", "train.steps=100000")
    wait_until(lambda: steps_logged(run) > 3, explain=lambda: slurm.log(job))
    slurm("scancel", job)
    end = slurm.wait_for_end(job)
    assert (end["JobState"], end["Restarts"]) == ("CANCELLED", "0"), slurm.log(job)
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("stopped", 75)
    assert (run / f"checkpoints/step-{status['step']:08d}/manifest.json").exists()


def test_failed_job_has_the_exit_code(slurm: Slurm, tmp_path: Path):
    job = slurm.submit(tmp_path / "nowhere.toml", tmp_path / "run")
    end = slurm.wait_for_end(job)
    assert (end["JobState"], end["ExitCode"], end["Restarts"]) == ("FAILED", "2:0", "0")
    assert "no such recipe" in slurm.log(job)


def test_a_killed_rank_ends_the_job(slurm: Slurm, recipe: Path):
    """The other rank says so; the job does not requeue itself."""
    run = slurm.folder / "killed"
    job = slurm.submit(recipe, run, *SETTINGS, "--set", "train.steps=100000")
    wait_until(lambda: steps_logged(run) > 3, explain=lambda: slurm.log(job))
    slurm("scancel", "--signal=KILL", f"{job}.0")
    end = slurm.wait_for_end(job)
    assert (end["JobState"], end["Restarts"]) == ("FAILED", "0"), slurm.log(job)
    assert end["ExitCode"].split(":")[0] == "137", end


@pytest.mark.slow
def test_a_rank_per_core_of_one_node(slurm: Slurm, recipe: Path, straight: Path):
    run = slurm.folder / "wide"
    job = slurm.submit(recipe, run, *SETTINGS, nodes=1)
    assert slurm.wait_for_end(job)["JobState"] == "COMPLETED", slurm.log(job)
    assert_two_ranks(run)
    assert_same_run(straight, run, STEPS)


def test_srun_starts_ranks_on_two_nodes_and_on_one(slurm: Slurm, recipe: Path, straight: Path):
    run = slurm.folder / "srun"
    pretrain = ["minigpt", "pretrain", str(recipe), "--out", str(run), *SETTINGS]
    with subprocess.Popen(
        ["srun", "--job-name=ranks", "--nodes=2", "--ntasks-per-node=1", *OPTIONS, *pretrain],
        env=slurm.env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as srun:  # fmt: skip
        wait_until(lambda: steps_logged(run) > 3, srun)
        slurm("scancel", "--signal=USR1", "--name=ranks")
        errors = srun.communicate(timeout=240)[1]
    assert srun.returncode == 75, errors
    assert errors.count("stopped by SIGUSR1 at step ") == 1
    assert_two_ranks(run)
    slurm("srun", "--partition=wide", "--ntasks-per-node=2", *OPTIONS, "minigpt", "resume", run)
    assert_two_ranks(run)
    assert_same_run(straight, run, STEPS)
