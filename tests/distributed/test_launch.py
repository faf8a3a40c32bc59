"""The launcher as a real process, with torch's agent and real workers (worker.py)."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from minigpt_cli.core.errors import UserError
from minigpt_cli.distributed.launch import launch
from tests.helpers.processes import ROOT, environment

HERE = Path(__file__).parent
AGAIN = "before training began; run the same command again to go on"
RESUME = "go on from the last checkpoint with `minigpt resume RUN`"

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


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def names(folder: Path, kind: str) -> list[str]:
    return sorted(path.stem for path in folder.glob(f"*.{kind}"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_exit_codes_and_output_pass_through_and_torch_prints_nothing(start: Start):
    killed = f"minigpt: rank 1 was killed by SIGKILL (out of memory?); {RESUME}\n"
    cases = {
        ("exit:0", "exit:0"): (0, ""),
        ("exit:0", "exit:130"): (130, ""),
        ("exit:0", "die"): (1, killed),
    }
    running = {actions: start(*actions) for actions in cases}
    for actions, expected in cases.items():
        output, errors = running[actions].communicate(timeout=240)
        assert (running[actions].returncode, errors) == expected, actions
        threads = environment()["OMP_NUM_THREADS"]  # left as it is
        lines = [f"rank {rank} of 2, {threads} threads, signals held: True" for rank in (0, 1)]
        assert actions[1] == "die" or sorted(output.splitlines()) == lines


def test_a_workers_own_traceback_is_the_only_one(start: Start):
    launcher = start("raise", "save:0", patience={"failed": 0.1})
    _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 1
    assert errors.startswith("Traceback")
    assert errors.endswith("\nRuntimeError: a bug\n")
    assert errors.count("Traceback") == 1


def test_signals_reach_the_workers_which_save_as_long_as_they_need(tmp_path: Path, start: Start):
    """The second takes 3 s longer than the first, and a failure's patience would be over in 0.2 s.

    A second signal changes nothing, nor does one of another kind in the middle of the save.
    """
    hurry = {"failed": 0.1, "terminated": 0.1}
    launchers = {}
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        (tmp_path / signum.name).mkdir()
        program = (str(HERE / "worker.py"), str(tmp_path / signum.name), "save:0", "save:3")
        launchers[signum] = start(*program[1:], program=program[0], patience=hurry)
    for signum, launcher in launchers.items():
        folder = tmp_path / signum.name
        until(lambda: names(folder, "started") == ["0", "1"])  # noqa: B023
        launcher.send_signal(signum)
        launcher.send_signal(signum)
    for signum, launcher in launchers.items():
        until(lambda: names(tmp_path / signum.name, "saved"))  # noqa: B023
        launcher.send_signal(signal.SIGINT)
    for signum, launcher in launchers.items():
        _, errors = launcher.communicate(timeout=240)
        assert (launcher.returncode, errors) == (130 if signum == signal.SIGINT else 75, "")
        for rank in (0, 1):
            got = (tmp_path / signum.name / f"{rank}.saved").read_text().split()
            assert got[0] == str(int(signum))


def test_a_signal_that_is_ignored_stays_so(tmp_path: Path, start: Start):
    """``nohup minigpt pretrain ... --nproc 2``"""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        launcher = start("save:0", "save:0")
    finally:
        signal.signal(signal.SIGHUP, before)
    until(lambda: names(tmp_path, "started") == ["0", "1"])
    launcher.send_signal(signal.SIGHUP)
    for rank in (0, 1):
        os.kill(int((tmp_path / f"{rank}.started").read_text()), signal.SIGHUP)
    launcher.send_signal(signal.SIGTERM)
    launcher.communicate(timeout=240)
    assert launcher.returncode == 75
    assert (tmp_path / "1.saved").read_text() == str(int(signal.SIGTERM))


def test_no_worker_is_left_when_the_launcher_is_killed(tmp_path: Path, start: Start):
    launcher = start("save:0", "torch")
    until(lambda: names(tmp_path, "started") == ["0", "1"])
    workers = [int(path.read_text()) for path in tmp_path.glob("*.started")]
    launcher.kill()  # while one imports torch
    until(lambda: all(map(gone, workers)))
    assert names(tmp_path, "saved") == ["0", "1"]


def test_a_signal_before_there_are_workers(tmp_path: Path, start: Start):
    importing = start("save:0", "save:0")
    waiting = start("save:0", "save:0", nnodes=2, rdzv_endpoint=f"localhost:{free_port()}")
    until(lambda: "libtorch" in Path(f"/proc/{importing.pid}/maps").read_text())
    importing.send_signal(signal.SIGINT)
    assert waiting.stderr is not None
    assert waiting.stderr.readline().startswith("minigpt: waiting for 2 nodes at localhost:")
    waiting.send_signal(signal.SIGTERM)
    _, errors = importing.communicate(timeout=240)
    assert (importing.returncode, errors) == (130, f"minigpt: stopped by SIGINT {AGAIN}\n")
    _, errors = waiting.communicate(timeout=240)
    assert (waiting.returncode, errors) == (75, f"minigpt: stopped by SIGTERM {AGAIN}\n")
    assert names(tmp_path, "started") == []


def test_a_node_that_leaves_before_all_came_sends_the_others_home(start: Start):
    port = free_port()
    nodes = {"nnodes": 3, "rdzv_endpoint": f"127.0.0.1:{port}"}
    staying = start(**nodes)
    until(lambda: connections(port) == 1)  # it hosts the rendezvous
    leaving = start(**nodes)
    until(lambda: connections(port) == 2)
    leaving.send_signal(signal.SIGTERM)
    for launcher, line in (
        (leaving, f"minigpt: stopped by SIGTERM {AGAIN}"),
        (staying, f"minigpt: the rendezvous at 127.0.0.1:{port} was closed before training began, "
                  "because another node has left it; run the same command on all nodes again"),
    ):  # fmt: skip
        _, errors = launcher.communicate(timeout=240)
        assert (launcher.returncode, errors.splitlines()[1:]) == (75, [line])


def connections(port: int) -> int:
    """How many connections this machine has accepted at ``port``."""
    tables = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))  # the second one where there is IPv6
    lines = "".join(table.read_text() for table in tables if table.exists())
    fields = [line.split() for line in lines.splitlines()]
    return sum(f[1].endswith(f":{port:04X}") and f[3] == "01" for f in fields)


def test_two_nodes_end_with_one_code(start: Start, tmp_path: Path):
    """Each case: what ranks 0 to 3 do, what all launchers end with, what they print."""
    where = f"on node 1 ({socket.gethostname()})"
    killed = f"minigpt: rank 2 {where} was killed by SIGKILL (out of memory?); {RESUME}\n"
    cases = {
        ("save:0", "save:0", "exit:3", "save:0"): (3, ""),
        ("stay", "save:0", "die", "save:0"): (1, killed),
    }
    hurry = {"failed": 1, "terminated": 10}
    running = {}
    for number, actions in enumerate(cases):
        (tmp_path / str(number)).mkdir()
        program = (str(HERE / "worker.py"), str(tmp_path / str(number)), *actions)
        nodes = {"nnodes": 2, "rdzv_endpoint": f"127.0.0.1:{free_port()}", "patience": hurry}
        running[actions] = [start(*program[1:], program=program[0], **nodes) for _ in (0, 1)]
    for actions, (code, printed) in cases.items():
        for launcher in running[actions]:
            output, errors = launcher.communicate(timeout=240)
            first, _, rest = errors.partition("\n")
            assert first.startswith("minigpt: waiting for 2 nodes at 127.0.0.1:")
            assert (launcher.returncode, rest) == (code, printed), actions
            assert output.count(" of 4, ") == 2 or "die" in actions


def test_a_signal_to_one_node_stops_both(start: Start, tmp_path: Path):
    nodes = {"nnodes": 2, "rdzv_endpoint": f"localhost:{free_port()}"}
    first = start(*["save:0"] * 4, **nodes)
    second = start(*["save:0"] * 4, **nodes)
    until(lambda: names(tmp_path, "started") == ["0", "1", "2", "3"])
    second.send_signal(signal.SIGUSR1)
    for launcher in (first, second):
        launcher.communicate(timeout=240)
        assert launcher.returncode == 75
    assert {(tmp_path / f"{rank}.saved").read_text() for rank in range(4)} == {
        str(int(signal.SIGUSR1))
    }


def test_nodes_that_do_not_come_and_a_port_that_is_taken(start: Start, tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as other:  # accepts, and never answers
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        alone = f"127.0.0.1:{free_port()}"
        short = {"join": 2, "reach": 3}
        refused = start(nnodes=2, rdzv_endpoint=taken, patience=short)
        waited = start(nnodes=2, rdzv_endpoint=alone, patience=short)
        _, errors = waited.communicate(timeout=240)
        assert waited.returncode == 2
        assert errors.splitlines()[1:] == [
            f"minigpt: waited 2 s at {alone}, but 2 nodes did not come: run the same command on "
            "each of them, and see that --nnodes 2 is right"
        ]
        _, errors = refused.communicate(timeout=240)
        assert refused.returncode == 2
        assert errors.splitlines()[-1].startswith(
            f"minigpt: --rdzv-endpoint {taken}: no rendezvous is there or can be opened there ("
        )
        assert "Traceback" not in errors


def test_minigpt_itself_is_what_workers_run(start: Start, tmp_path: Path):
    """Also where the working directory holds something of the name of a module."""
    (tmp_path / "queue.py").write_text("raise RuntimeError('the wrong module')")
    launcher = start("verify", "$nowhere$$", program="minigpt")
    _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 2
    assert errors == f"minigpt: {tmp_path}/$nowhere$$: no such run or checkpoint\n" * 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nproc": 0}, "--nproc must be at least 1, not 0"),
        ({"nproc": 1, "nnodes": 0}, "--nnodes must be at least 1, not 0"),
        ({"nproc": 1, "nnodes": 2}, "--nnodes 2 needs --rdzv-endpoint HOST:PORT"),
        ({"nproc": 1, "nnodes": 2, "rdzv_endpoint": "node1"}, "must be HOST:PORT"),
        ({"nproc": 1, "nnodes": 2, "rdzv_endpoint": "x.invalid:1"}, "can't find the host"),
    ],
)
def test_wrong_settings_are_refused_before_anything_starts(settings: dict, message: str):
    with pytest.raises(UserError, match=message):
        launch(["--version"], **settings)
    assert "MINIGPT_LAUNCHER_PID" not in os.environ
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_torch_is_imported_only_once_the_settings_are_right():
    code = (
        "import sys\nfrom minigpt_cli.distributed.launch import launch\n"
        "try: launch([], nproc=1, nnodes=2, rdzv_endpoint='x.invalid:1')\n"
        "except Exception as error: print(error.exit_code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "2 False\n", done.stderr
