"""How the ends of several processes become one: real ones, of the shell."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigpt_cli.distributed.workers import Ending, Patience, Workers

QUICK = Patience(saved=60, failed=0.3, terminated=0.3)
STAY = "trap '' TERM; while :; do sleep 0.05; done"


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.kill()
    for process in workers.processes.values():
        process.wait()


def begin(workers: Workers, *scripts: str) -> None:
    """Start a shell for each; ``$BEFORE`` is the process id of the one before."""
    processes: dict[int, subprocess.Popen[bytes]] = {}
    for rank, script in enumerate(scripts):
        before = str(processes[rank - 1].pid) if rank else ""
        processes[rank] = subprocess.Popen(
            ["sh", "-c", script], env=os.environ | {"BEFORE": before}, start_new_session=True
        )
    workers.started(processes)


def wait(workers: Workers, patience: Patience = QUICK) -> Ending:
    return workers.wait(lambda rank: f"rank {rank}", patience, lambda known: known)


THEN = "while kill -0 $BEFORE 2>&-; do sleep 0.02; done;"  # until it ended, and was seen to


@pytest.mark.parametrize(
    ("scripts", "code"),
    [
        (["exit 0", "exit 0"], 0),
        (["exit 0", f"{THEN} exit 3"], 3),
        (["exit 75", f"{THEN} exit 75"], 75),
        (["exit 130", f"{THEN} exit 130"], 130),
        (["exit 0", f"{THEN} exit 75"], 75),
        (["exit 3", f"{THEN} exit 4"], 3),  # the second because of the first
        (["exit 4", f"{THEN} exit 1"], 4),
        (["exit 1", f"{THEN} exit 2"], 1),
        (["exit 2", f"{THEN} exit 75"], 2),
        (["exit 75", f"{THEN} exit 2"], 2),  # so not everything is saved
        (["exit 75", f"{THEN} exit 0"], 75),
    ],
)
def test_the_first_failure_counts_and_stopped_means_that_none_failed(
    workers: Workers, scripts: list[str], code: int
):
    begin(workers, *scripts)
    assert wait(workers, Patience()) == Ending(code)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("kill -KILL $$", "rank 1 was killed by SIGKILL (out of memory?)"),
        ("kill -SEGV $$", "rank 1 was killed by SIGSEGV"),
        ("kill -TERM $$", "rank 1 was killed by SIGTERM"),
        ("exit 5", "rank 1 ended with exit code 5"),
        ("exit 127", "rank 1 ended with exit code 127"),
    ],
)
def test_an_end_that_the_worker_cannot_explain_is_explained(
    workers: Workers, end: str, message: str
):
    begin(workers, "exit 0", f"{THEN} {end}", f"{THEN} exit 1")
    resume = "go on from the last checkpoint with `minigpt resume RUN`"
    assert wait(workers) == Ending(1, f"{message}; {resume}")


def test_at_the_same_moment_a_verdict_comes_before_a_death_and_that_before_what_follows(
    workers: Workers,
):
    begin(workers, "exit 1", "kill -KILL $$", "exit 75")
    for process in workers.processes.values():
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert "rank 1 was killed by SIGKILL" in wait(workers).message
    begin(workers, "exit 1", "kill -KILL $$", "exit 3")
    for process in workers.processes.values():
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert wait(workers) == Ending(3)


def test_after_a_failure_those_that_hang_are_killed_with_what_they_started(
    workers: Workers, tmp_path: Path
):
    begin(workers, f"sleep 1000 & echo $! > {tmp_path}/child; {STAY}",
          f"until [ -s {tmp_path}/child ]; do sleep 0.02; done; exit 4")  # fmt: skip
    assert wait(workers) == Ending(4)
    assert workers.processes[0].returncode == -signal.SIGKILL
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and "Z" not in state(child):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_one_that_hangs_after_the_others_stopped_is_killed_and_so_it_failed(workers: Workers):
    begin(workers, STAY, "exit 75")
    ending = wait(workers, Patience(saved=0.3, terminated=0.3))
    assert ending.code == 1
    assert ending.message.startswith("rank 0 did not end with the others and was killed; go on")


def test_one_that_stopped_waits_longer_than_one_that_failed(workers: Workers):
    begin(workers, "exit 75", f"{THEN} sleep 1.5; exit 75")
    assert wait(workers, Patience(saved=60, failed=0.1, terminated=0.1)) == Ending(75)


def test_a_signal_reaches_also_those_that_start_after_it_and_its_echo_does_not(
    workers: Workers, tmp_path: Path
):
    begin(workers, noting(tmp_path, "exit 75"))
    until_ready(tmp_path)
    processes, workers.processes = workers.processes, {}
    workers.stop(signal.SIGTERM)
    workers.started(processes)
    workers.stop(signal.SIGINT)
    assert wait(workers) == Ending(75)
    assert (tmp_path / "got").read_text() == "TERM\n"


def test_a_signal_is_passed_on_again_when_it_comes_again_later(workers: Workers, tmp_path: Path):
    workers.AGAIN = 0.0
    begin(workers, noting(tmp_path, "grep -q INT got && exit 75"))
    until_ready(tmp_path)
    workers.stop(signal.SIGTERM)
    workers.stop(signal.SIGINT)
    assert wait(workers) == Ending(75)


def noting(folder: Path, then: str) -> str:
    """A script that notes the signals it gets in FOLDER/got, and once it has one does ``then``."""
    traps = "".join(f"trap 'echo {name} >> got' {name};" for name in ("TERM", "INT"))
    loop = f"while :; do sleep 0.05; if [ -s got ]; then sleep 0.3; {then}; fi; done"
    return f"cd {folder}; {traps} : > ready; {loop}"


def until_ready(folder: Path) -> None:
    while not (folder / "ready").exists():
        time.sleep(0.01)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_worker_that_the_signal_kills_has_nothing_to_lose_yet(
    workers: Workers, signum: signal.Signals, code: int
):
    begin(workers, "exec sleep 1000")
    workers.stop(signum)
    message = f"stopped by {signum.name} before training began; run the same command again to go on"
    assert wait(workers) == Ending(code, message)
