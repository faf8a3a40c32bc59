"""Signals outside the training loop; tests/faults sends them to real runs."""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minigpt_cli import stopping
from minigpt_cli.errors import Stopped
from minigpt_cli.train.stop import StopRequest
from tests.processes import environment


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(stopping._Seen, "signum", None)
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, stopping.SIGNALS)


def send(signum: int) -> None:
    """To this thread: numpy's and torch's own threads don't hold signals, where there are any."""
    signal.pthread_kill(threading.get_ident(), signum)


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)],
)
def test_a_blocked_signal_raises_once_it_is_handled(signum: signal.Signals, code: int):
    stopping.block_signals()
    send(signum)
    with pytest.raises(Stopped, match=f"stopped by {signum.name}; run the same command") as stopped:
        stopping.stop_at_signals()
    assert stopped.value.exit_code == code


def test_the_second_does_nothing_until_the_first_had_its_time(monkeypatch: pytest.MonkeyPatch):
    stopping.stop_at_signals()
    with pytest.raises(Stopped):
        send(signal.SIGTERM)
    send(signal.SIGTERM)
    send(signal.SIGINT)
    monkeypatch.setattr(stopping, "PATIENCE", 0.0)
    with pytest.raises(Stopped, match="SIGTERM"):
        send(signal.SIGINT)


def test_what_catches_exceptions_does_not_take_a_signal_for_one():
    """A signal that came while a tokenizer was read had made the dataset a damaged one."""
    stopping.stop_at_signals()
    with pytest.raises(Stopped), contextlib.suppress(Exception):
        send(signal.SIGUSR1)


def test_one_whose_exception_was_swallowed_stops_the_training_loop():
    stopping.stop_at_signals()
    with contextlib.suppress(BaseException):
        send(signal.SIGUSR1)
    with StopRequest() as stop:
        assert stop.signum == signal.SIGUSR1


def test_what_is_ignored_stays_so_and_at_the_end_all_is():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
    stopping.stop_at_signals()
    send(signal.SIGINT)
    stopping.ignore_signals()
    for signum in stopping.SIGNALS:
        send(signum)
    assert stopping.first_signal() is None


HAILED = """
import sys, time
from minigpt_cli import stopping
from minigpt_cli.errors import Stopped
stopping.stop_at_signals()
try:
    import takes_long
    time.sleep(60)
except Stopped as error:
    stopping.ignore_signals()
    print(error, error.exit_code)
"""


def test_a_signal_while_an_object_is_deleted_is_not_lost():
    """Python ignores what __del__ raises, and prints a traceback of it."""
    deleting = """
class Large:
    def __del__(self):
        print("ready", flush=True)
        end = time.monotonic() + 0.5
        while time.monotonic() < end: pass
"""
    program = HAILED.replace("stopping.stop_at", deleting + "stopping.stop_at")
    with subprocess.Popen(
        [sys.executable, "-c", program.replace("import takes_long", "Large()")],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment(),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        said = process.stdout.read()
    assert said == "stopped by SIGUSR1; run the same command again to go on 75\n"


def test_a_hail_of_signals_while_something_is_imported(tmp_path: Path):
    """Each had started a thread in its handler, and handlers had interrupted one another until
    Python's stack was full."""
    (tmp_path / "takes_long.py").write_text(
        'import time\nprint("ready", flush=True)\nend = time.monotonic() + 1\n'
        "while time.monotonic() < end: pass\n"
    )
    (tmp_path / "main.py").write_text(HAILED)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "main.py"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=environment(),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    end = time.monotonic() + 0.8
    while time.monotonic() < end:
        process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=30)
    assert said == "stopped by SIGUSR1; run the same command again to go on 75\n"
