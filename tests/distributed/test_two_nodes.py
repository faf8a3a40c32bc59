"""Two nodes, under torchrun: links are cut, nodes are killed, and the run goes on.

Needs root, for network namespaces.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt_cli.recipe import load_recipe
from minigpt_cli.report import metrics
from minigpt_cli.train.loop import fit
from minigpt_cli.train.start import start_run
from tests.helpers.nodes import ADDRESSES, NOBODY, Job, Nodes
from tests.helpers.recipes import TINY
from tests.helpers.runs import curve, whole_tensors
from tests.helpers.waiting import wait_until

STEPS = 160
SET = [
    f"train.steps={STEPS}", "precision.dtype=fp64", "eval.every_steps=40",
    "checkpoint.every_steps=10", "distributed.strategy=ddp",
    "distributed.timeout_minutes=0.2",
]  # fmt: skip
TIMEOUT = 12  # seconds, the same


@contextmanager
def connected(pair: str) -> Iterator[Nodes]:
    both = Nodes(pair)
    try:
        if os.geteuid():
            pytest.skip("network namespaces need root")
        try:
            both.up()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield both
    finally:
        both.down()


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with connected("a") as both:
        yield both


@pytest.fixture(scope="module")
def unanswered(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[list[tuple[subprocess.Popen[bytes], Path, float]]]:
    """Ranks 1 whose rank 0 is said to be where packets are lost, and where a listener is silent.

    Each with its log, and the time when it was started. They wait beside the other tests, on nodes
    that those don't kill.
    """
    folder = tmp_path_factory.mktemp("unanswered")
    started = []
    with connected("b") as nodes, socket.create_server(("127.0.0.1", 0)) as silent:
        for name, address, port in (("lost", NOBODY, 29_400), ("silent", *silent.getsockname())):
            env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": address, "MASTER_PORT": str(port)}
            log, command = folder / name, ["-m", "minigpt_cli", "pretrain", "x.toml"]
            process = nodes.start(1 if name == "lost" else None, log, *command, **env)
            started.append((process, log, time.monotonic()))
        yield started
        for process, _, _ in started:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def folder(license_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    recipes_file = out / "tiny.toml"
    recipes_file.write_text(TINY.format(data=license_dataset))
    return out


@pytest.fixture(scope="module")
def straight(nodes: Nodes, folder: Path, unanswered: Any) -> Path:
    """A run of two nodes that nothing disturbed."""
    job = Job(nodes, folder, "pretrain", "tiny.toml", "--out", "straight", *settings())
    assert job.end(120) == [0, 0], job.log(0) + job.log(1)
    assert job.said(0) + job.said(1) == []
    return folder / "straight"


def settings(*more: str) -> list[str]:
    return [word for setting in (*SET, *more) for word in ("--set", setting)]


def step(run: Path) -> int:
    lines = metrics.read(run) if (run / "metrics.jsonl").exists() else []
    return lines[-1]["step"] if lines else 0


def status(run: Path) -> tuple[str, int]:
    values = json.loads((run / "status.json").read_text())
    return values["status"], values["exit_code"]


def assert_same(run: Path, straight: Path) -> None:
    """To the last bit: the layout is the same."""
    assert curve(run) == curve(straight)
    last = f"checkpoints/step-{STEPS:08d}"
    one, other = whole_tensors(run / last), whole_tensors(straight / last)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert status(run) == ("finished", 0)


def test_two_nodes_give_the_losses_of_one_process(straight: Path, folder: Path):
    recipe = load_recipe(folder / "tiny.toml", SET)
    fit(*start_run(recipe, folder / "alone"))
    for line, expected in zip(curve(straight), curve(folder / "alone"), strict=True):
        assert line == pytest.approx(expected, rel=1e-10 if "grad_norm" in line else 1e-12)


@pytest.mark.slow
def test_faults_change_nothing(nodes: Nodes, straight: Path, folder: Path):
    run = folder / "disturbed"

    # Saving at every step: the cut finds a save in flight.
    every_step = settings("checkpoint.every_steps=1")
    job = Job(nodes, folder, "pretrain", "tiny.toml", "--out", run, *every_step)
    wait_until(lambda: step(run) >= 10)
    with nodes.cut():
        time.sleep(1.5)
        before = step(run)
    wait_until(lambda: step(run) >= before + 5)  # it goes on as if nothing had happened
    with nodes.cut():
        since = time.monotonic()
        wait_until(lambda: not job.workers(0) + job.workers(1), seconds=TIMEOUT + 30)
        print(f"ended {time.monotonic() - since:.1f} s after the cut")
        # torchrun itself can't end on node 1 as long as it waits for its store on node 0
    assert job.end() == [1, 1]
    assert_lost(job, 0, run)
    assert_lost(job, 1, run)
    failed_at = assert_failed(run)

    job = Job(nodes, folder, "resume", run, "--set", "checkpoint.every_steps=2")
    wait_until(lambda: step(run) >= failed_at + 5)
    nodes.kill(1)
    assert job.end() == [1, -signal.SIGKILL]
    assert_lost(job, 0, run)
    failed_at = assert_failed(run)

    job = Job(nodes, folder, "resume", run)
    wait_until(lambda: step(run) >= failed_at + 5)
    job.launchers[1].send_signal(signal.SIGUSR1)
    assert job.end() == [1, 1]  # torchrun turns every code into 1
    said = job.said(0) + job.said(1)
    print("\n".join(said))
    assert sum("stopped by SIGUSR1 at step " in line for line in said) == 1
    assert status(run) == ("stopped", 75)
    stopped_at = step(run)
    assert stopped_at < STEPS

    job = Job(nodes, folder, "resume", run)
    assert job.end() == [0, 0]
    assert_same(run, straight)


def assert_lost(job: Job, node: int, run: Path) -> None:
    lost = [line for line in job.said(node) if "is lost" in line]
    print("\n".join(job.said(node)))
    assert len(lost) == 1, job.log(node)
    assert lost[0].startswith("minigpt: the connection to another rank is lost (")
    hint = f"; go on from the last checkpoint with `minigpt resume {run}` (docs/faq.md: it-hangs)"
    assert lost[0].endswith(hint)


def assert_failed(run: Path) -> int:
    """The step at which it failed."""
    assert status(run) == ("failed", 1)
    assert step(run) < STEPS
    return step(run)


def test_nobody_answers(unanswered: Any):
    for process, log, since in unanswered:
        assert process.wait(timeout=60 - (time.monotonic() - since)) == 2
        print(log.read_text())
        (line,) = log.read_text().splitlines()
        assert line.startswith("minigpt: rank 1: can't reach ")
        assert ", where all ranks meet: " in line
        assert line.endswith("; check MASTER_ADDR and MASTER_PORT")


def copy_from(straight: Path, name: str, step: int) -> Path:
    """The run as it stood at one of its checkpoints."""
    run, kept = straight.with_name(name), f"step-{step:08d}"

    def others(_: str, names: list[str]) -> list[str]:
        return [each for each in names if each.startswith("step-") and each != kept]

    shutil.copytree(straight, run, ignore=others)
    metrics.cut_back(run, step, evaluated=False)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_either_node_may_be_killed(nodes: Nodes, straight: Path, folder: Path, killed: int):
    run = copy_from(straight, f"killed-{killed}", 10)
    job = Job(nodes, folder, "resume", run)
    wait_until(lambda: step(run) >= 20)
    nodes.kill(killed)
    codes = job.end(120)
    print(codes)
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1
    assert_lost(job, 1 - killed, run)
    # Rank 0 writes the file; where it was killed, nobody is left to say more.
    assert status(run) == (("failed", 1) if killed else ("running", None))
    assert Job(nodes, folder, "resume", run).end() == [0, 0]
    assert_same(run, straight)


@pytest.mark.slow
def test_a_link_is_cut_while_training_waits_for_a_save(nodes: Nodes, straight: Path, folder: Path):
    run = copy_from(straight, "synchronous", 10)
    every_step = ("--set", "checkpoint.every_steps=1", "--set", "checkpoint.asynchronous=false")
    job = Job(nodes, folder, "resume", run, *every_step)
    wait_until(lambda: step(run) >= 20)
    with nodes.cut():
        wait_until(lambda: not set(job.workers(0)) | set(job.workers(1)), seconds=TIMEOUT + 30)
    print(job.end(120))
    assert_lost(job, 0, run)
    assert_lost(job, 1, run)
    assert_failed(run)
    seldom = ("--set", "checkpoint.every_steps=10")
    assert Job(nodes, folder, "resume", run, *seldom).end(120) == [0, 0]
    assert_same(run, straight)


def test_gloo_avoids_loopback(nodes: Nodes, folder: Path):
    """As Debian's /etc/hosts has it: 127.0.1.1, which is nobody else's way to it."""
    program = (
        "import os; from minigpt_cli.cli import _leave; "
        "from minigpt_cli.distributed.world import start_world; start_world(); "
        "print(os.environ['GLOO_SOCKET_IFNAME']); _leave(0)"
    )
    port = str(next(nodes.ports))
    logs = [folder / f"{port}-{node}.log" for node in (0, 1)]
    ranks = [
        nodes.start(node, log, "-c", program, RANK=str(node), WORLD_SIZE="2", MASTER_ADDR=address,
                    MASTER_PORT=port, TORCH_CPP_LOG_LEVEL="ERROR")
        for node, (log, address) in enumerate(zip(logs, ("127.0.1.1", ADDRESSES[0]), strict=True))
    ]  # fmt: skip
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    assert [log.read_text().split() for log in logs] == [[end] for end in nodes.ends]


@pytest.mark.slow
def test_torchrun_starts_the_workers_anew(nodes: Nodes, straight: Path, folder: Path):
    """With the old store, in which is all that the workers before have said."""
    run = copy_from(straight, "anew", 10)
    job = Job(nodes, folder, "resume", run, torchrun=("--max-restarts", "2"))
    wait_until(lambda: step(run) >= 20)
    for pid in job.workers(1):
        os.kill(pid, signal.SIGKILL)
    assert job.end(120) == [0, 0]
    assert_lost(job, 0, run)
    assert_same(run, straight)


@pytest.mark.slow
@pytest.mark.parametrize("node", [0, 1])
def test_killed_torchrun(nodes: Nodes, straight: Path, folder: Path, node: int):
    run = copy_from(straight, f"orphans-{node}", 10)
    job = Job(nodes, folder, "resume", run)
    wait_until(lambda: step(run) >= 20)
    job.launchers[node].kill()
    wait_until(lambda: not job.workers(0) + job.workers(1))
    job.end(120)
    assert status(run) == ("stopped", 75)
    assert step(run) < STEPS
    assert Job(nodes, folder, "resume", run).end() == [0, 0]
    assert_same(run, straight)
