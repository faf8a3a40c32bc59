"""The launcher as a real process, with real workers (worker.py) or shell scripts as workers."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minigpt_cli.checkpoint.store import list_steps
from minigpt_cli.distributed.launch import ECHO_SECONDS
from tests.helpers.processes import Process, environment, family, fresh, ranks
from tests.helpers.ranks import gone
from tests.helpers.sockets import listening
from tests.helpers.waiting import wait_until

HERE = Path(__file__).parent
AGAIN = "run the same command again (docs/faq.md: it-hangs)"  # there is no checkpoint
HURRY = {"failed": 0.1, "terminated": 0.1}

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """``start(ACTION..., nproc=...)`` starts a launcher, killed at the test's end."""
    started: list[subprocess.Popen[str]] = []

    def begin(*actions: str, program: str = "", **settings: object) -> subprocess.Popen[str]:
        command = [program] if program else [str(HERE / "worker.py"), str(tmp_path)]
        given = json.dumps({"nproc": 2} | settings)
        launcher = subprocess.Popen(
            [sys.executable, str(HERE / "launcher.py"), given, *command, *actions],
            env=environment(), text=True, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(launcher)
        return launcher

    yield begin
    for launcher in started:
        if launcher.poll() is None:
            launcher.kill()
    for path in tmp_path.rglob("*.started"):
        if not gone(int(path.read_text())):
            os.kill(int(path.read_text()), signal.SIGKILL)
    for launcher in started:
        launcher.communicate()


def names(folder: Path, kind: str) -> list[str]:
    return sorted(path.stem for path in folder.glob(f"*.{kind}"))


def both_started(folder: Path) -> Callable[[], bool]:
    return lambda: names(folder, "started") == ["0", "1"]


def test_exit_codes_and_output(start: Start):
    killed = f"minigpt: rank 1 was killed by SIGKILL, probably out of memory; {AGAIN}\n"
    cases = {
        ("exit:0", "exit:0"): (0, ""),
        ("exit:0", "exit:130"): (130, ""),
        ("exit:3", "exit:3"): (3, ""),
        ("exit:0", "die"): (1, killed),
    }
    running = {actions: start(*actions, timeouts={"failed": 200}) for actions in cases}
    for actions, expected in cases.items():
        output, errors = running[actions].communicate(timeout=240)
        assert (running[actions].returncode, errors) == expected, actions
        threads = environment()["OMP_NUM_THREADS"]  # left as it is
        lines = [f"rank {rank} of 2, {threads} threads, signals blocked: True" for rank in (0, 1)]
        lines.append("torch in the launcher: False")
        assert actions[1] == "die" or sorted(output.splitlines()) == lines


def test_one_rank(start: Start):
    launcher = start("exit:4", nproc=1)
    output, errors = launcher.communicate(timeout=240)
    assert (launcher.returncode, errors) == (4, "")
    assert "rank 0 of 1" in output


def test_only_the_workers_traceback(start: Start):
    launcher = start("raise", "save:0", timeouts={"failed": 0.1})
    _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 1
    assert errors.startswith("Traceback")
    assert errors.endswith("\nRuntimeError: a bug\n")
    assert errors.count("Traceback") == 1


def test_signals_are_passed_on(tmp_path: Path, start: Start):
    """Workers save as long as they need: rank 1 takes 3 s longer than rank 0, and the time limit
    after a failure would be 0.2 s.

    A second signal changes nothing, nor does one of another kind in the middle of the save.
    """
    launchers = {}
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        (tmp_path / signum.name).mkdir()
        program = (str(HERE / "worker.py"), str(tmp_path / signum.name), "save:0", "save:3")
        launchers[signum] = start(*program[1:], program=program[0], timeouts=HURRY)
    for signum, launcher in launchers.items():
        wait_until(both_started(tmp_path / signum.name))
        launcher.send_signal(signum)
        launcher.send_signal(signum)
    for signum, launcher in launchers.items():
        wait_until(lambda: names(tmp_path / signum.name, "saved"))  # noqa: B023
        launcher.send_signal(signal.SIGINT)
    for signum, launcher in launchers.items():
        _, errors = launcher.communicate(timeout=240)
        assert (launcher.returncode, errors) == (130 if signum == signal.SIGINT else 75, "")
        for rank in (0, 1):
            got = (tmp_path / signum.name / f"{rank}.saved").read_text().split()
            assert got[0] == str(int(signum))


def test_a_hail_of_signals(tmp_path: Path, start: Start):
    launcher = start("save:1", "save:1")
    wait_until(both_started(tmp_path))
    wait_until(lambda: launcher.send_signal(signal.SIGUSR1) or launcher.poll() is not None)
    assert launcher.returncode == 75
    for rank in (0, 1):
        assert (tmp_path / f"{rank}.saved").read_text() == str(int(signal.SIGUSR1))


def test_a_later_signal_is_passed_on_too(tmp_path: Path, start: Start):
    """The first may have got lost. What comes within ``ECHO_SECONDS`` is taken for its echo."""
    launcher = start("again", "again")
    wait_until(both_started(tmp_path))
    began = time.monotonic()
    launcher.send_signal(signal.SIGTERM)
    wait_until(lambda: launcher.send_signal(signal.SIGUSR1) or launcher.poll() is not None)
    assert time.monotonic() - began >= ECHO_SECONDS
    assert launcher.returncode == 75
    for rank in (0, 1):
        got = (tmp_path / f"{rank}.saved").read_text().split()
        assert (len(got), got[-1]) == (2, str(int(signal.SIGUSR1)))


def test_a_signal_while_workers_start_reaches_all(tmp_path: Path, start: Start):
    actions = ["save:0"] * 6
    launcher = start(*actions, nproc=len(actions))
    wait_until(lambda: names(tmp_path, "started"))  # the last are not there yet
    launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate(timeout=240)
    assert (launcher.returncode, errors) == (75, "")
    assert names(tmp_path, "saved") == [str(rank) for rank in range(len(actions))]


def test_an_ignored_signal_stays_ignored(tmp_path: Path, start: Start):
    """``nohup minigpt pretrain ... --nproc 2``"""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launcher = start("save:0", "save:0")
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_until(both_started(tmp_path))
    launcher.send_signal(signal.SIGHUP)
    for rank in (0, 1):
        os.kill(int((tmp_path / f"{rank}.started").read_text()), signal.SIGHUP)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=240)
    assert launcher.returncode == 75
    assert (tmp_path / "1.saved").read_text() == str(int(signal.SIGTERM))


def test_no_worker_outlives_a_killed_launcher(tmp_path: Path, start: Start):
    launcher = start("save:0", "torch")
    wait_until(both_started(tmp_path))
    workers = [int(path.read_text()) for path in tmp_path.glob("*.started")]
    launcher.kill()  # while one imports torch
    wait_until(lambda: all(map(gone, workers)))
    assert names(tmp_path, "saved") == ["0", "1"]


def test_workers_that_hang_are_killed(tmp_path: Path, start: Start):
    """With all that they have started, after a failure and after a stop."""
    hanging = (
        "import os, pathlib, signal, subprocess, sys, time\n"
        "rank, folder, code = os.environ['RANK'], pathlib.Path(sys.argv[1]), int(sys.argv[2])\n"
        "if rank == '0':\n"
        "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "    child = subprocess.Popen(['sleep', '1000'])\n"
        "    (folder / '.child').write_text(str(child.pid))\n"
        "    (folder / '.child').rename(folder / 'child')\n"
        "    time.sleep(1000)\n"
        "while not (folder / 'child').exists(): time.sleep(0.02)\n"
        "sys.exit(code)\n"
    )
    (tmp_path / "hanging.py").write_text(hanging)
    hung = f"minigpt: rank 0 did not end with the others and was killed; {AGAIN}\n"
    for code, expected in ((4, (4, "")), (75, (1, hung))):
        folder = tmp_path / str(code)
        folder.mkdir()
        launcher = start(str(folder), str(code), program=str(tmp_path / "hanging.py"),
                         timeouts={**HURRY, "saved": 0.1})  # fmt: skip
        _, errors = launcher.communicate(timeout=240)
        assert (launcher.returncode, errors) == expected
        wait_until(lambda: gone(int((folder / "child").read_text())))  # noqa: B023


def test_stopped_worker_waits_longer(start: Start):
    _, errors = (launcher := start("exit:75", "sleep:2,75", timeouts=HURRY)).communicate()
    assert (launcher.returncode, errors) == (75, "")
    began = time.monotonic()
    _, errors = (launcher := start("exit:2", "sleep:3600,75", timeouts=HURRY)).communicate()
    assert (launcher.returncode, errors) == (2, "")
    assert time.monotonic() - began < 3600


def test_workers_run_minigpt(start: Start, tmp_path: Path):
    """Also where the working directory holds something of the name of a module."""
    (tmp_path / "queue.py").write_text("raise RuntimeError('the wrong module')")
    launcher = start("verify", "$nowhere$$", program="minigpt")
    _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 2
    assert errors == "minigpt: $nowhere$$: no such run or checkpoint\n" * 2


# --- whole runs -----------------------------------------------------------------------------------


def pretrain(folder: Path, recipe: Path, *more: object) -> Process:
    return fresh(folder / "log", "pretrain", recipe, "--out", folder / "run", "--nproc", 2, "--set",
                 "train.steps=100000", "--set", "checkpoint.every_steps=4", *more)  # fmt: skip


def trains(run: Path) -> Callable[[], bool]:
    file = run / "metrics.jsonl"
    return lambda: file.exists() and file.read_text().count("\n") > 5


def test_all_listen_on_loopback_only(tmp_path: Path, recipe_file: Path):
    launcher = pretrain(tmp_path, recipe_file)
    try:
        wait_until(trains(tmp_path / "run"), launcher)
        workers = ranks(launcher)
        assert sorted(workers) == [0, 1]
        assert set(family(launcher)) >= {launcher.pid, *workers.values()}
        found = {pid: listening(pid) for pid in family(launcher)}
        assert found[workers[0]], launcher.tail  # the store, and gloo
        assert {address for places in found.values() for address, _ in places} == {"127.0.0.1"}
        assert not any("libtorch" in line for line in
                       Path(f"/proc/{launcher.pid}/maps").read_text().splitlines())  # fmt: skip
        launcher.send(signal.SIGINT)
        assert launcher.wait() == 130, launcher.tail
    finally:
        launcher.kill_all()
    (line,) = [line for line in launcher.said.splitlines() if line.startswith("minigpt: ")]
    assert line.startswith("minigpt: stopped by SIGINT at step ")


def test_killed_ranks_are_in_status_json(tmp_path: Path, recipe_file: Path):
    launcher = pretrain(tmp_path, recipe_file)
    run = tmp_path / "run"
    try:
        wait_until(lambda: list_steps(run), launcher)
        before = json.loads((run / "status.json").read_text())
        for pid in ranks(launcher).values():
            os.kill(pid, signal.SIGKILL)
        assert launcher.wait() == 1, launcher.tail
    finally:
        launcher.kill_all()
    status = json.loads((run / "status.json").read_text())
    message = launcher.said.splitlines()[-1].removeprefix("minigpt: ")
    assert re.fullmatch(
        r"rank [01] was killed by SIGKILL, probably out of memory; go on from the last checkpoint "
        rf"with `minigpt resume {run}` \(docs/faq.md: it-hangs\)",
        message,
    )
    assert status.keys() == before.keys()
    assert (before["status"], before["exit_code"]) == ("running", None)
    assert (status["status"], status["exit_code"], status["message"]) == ("failed", 1, message)
    assert (status["host"], status["step"]) == (os.uname().nodename, before["step"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.stepz=1", "stepz"),
        ("train.global_batch_size=4", "global_batch_size 4 can't be divided among 2 ranks"),
    ],
)
def test_a_recipe_is_checked_before_anything_starts(
    tmp_path: Path, recipe_file: Path, setting: str, message: str
):
    launcher = pretrain(tmp_path, recipe_file, "--set", setting)
    assert launcher.wait() == 2
    assert launcher.said.count("\n") == 1
    assert message in launcher.said
    assert not (tmp_path / "run").exists()
