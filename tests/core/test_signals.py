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

from minigpt_cli.core import signals
from minigpt_cli.core.errors import Stopped
from minigpt_cli.train.stop import StopRequest
from tests.helpers.processes import environment


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(signals._Seen, "signum", None)
    yield
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.SIGNALS)


def send(signum: int) -> None:
    """To this thread: numpy's and torch's own threads don't hold signals, where there are any."""
    signal.pthread_kill(threading.get_ident(), signum)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_held_signal_raises_later(signum: signal.Signals, code: int):
    signals.block_signals()
    send(signum)
    with pytest.raises(Stopped, match=f"stopped by {signum.name}; run the same command") as stopped:
        signals.stop_at_signals()
    assert stopped.value.exit_code == code


def test_second_signal_waits(monkeypatch: pytest.MonkeyPatch):
    signals.stop_at_signals()
    with pytest.raises(Stopped):
        send(signal.SIGTERM)
    send(signal.SIGTERM)
    send(signal.SIGINT)
    monkeypatch.setattr(signals, "PATIENCE", 0.0)
    with pytest.raises(Stopped, match="SIGTERM"):
        send(signal.SIGINT)


def test_stopped_is_no_exception():
    """A signal that came while a tokenizer was read had made the dataset a damaged one."""
    signals.stop_at_signals()
    with pytest.raises(Stopped), contextlib.suppress(Exception):
        send(signal.SIGUSR1)


def test_swallowed_signal_stops_training():
    signals.stop_at_signals()
    with contextlib.suppress(BaseException):
        send(signal.SIGUSR1)
    with StopRequest() as stop:
        assert stop.signum == signal.SIGUSR1


def test_ignored_signals():
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
    signals.stop_at_signals()
    send(signal.SIGINT)
    signals.ignore_signals()
    for signum in (*signals.SIGNALS, signal.SIGHUP):
        send(signum)
    assert signals.first_signal() is None


HAILED = """
import sys, time
from minigpt_cli.core import signals
from minigpt_cli.core.errors import Stopped
signals.stop_at_signals()
try:
    import takes_long
    time.sleep(60)
except Stopped as error:
    signals.ignore_signals()
    print(error, error.exit_code)
"""


def test_signal_in_del():
    """Python ignores what __del__ raises, and prints a traceback of it."""
    deleting = """
class Large:
    def __del__(self):
        print("ready", flush=True)
        end = time.monotonic() + 0.5
        while time.monotonic() < end: pass
"""
    program = HAILED.replace("signals.stop_at", deleting + "signals.stop_at")
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


def test_a_signal_is_not_repeated_for_another_handler():
    """The training loop's handler takes over while the signal of an import is repeated."""
    program = """
import os, signal, time
from minigpt_cli.core import signals
signals.stop_at_signals()
class Large:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000): pass
Large()
seen = []
signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
time.sleep(1)
print(len(seen))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment()
    )
    assert done.stdout == "1\n", done.stderr
