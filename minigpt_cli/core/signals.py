"""Signals that stop a command, from its first import until its exit code is decided.

A signal raises ``Stopped`` wherever the command is. Only the training loop, which has more to lose,
looks for signals between two steps (train/stop.py).
"""

import os
import signal
import threading
import time
from types import FrameType

from minigpt_cli.core.errors import Stopped

# All that ask to save and stop. USR1: often what Slurm's --signal sends; HUP: the terminal is gone.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PATIENCE = 5.0  # seconds for the first signal's exception to get through


class _Seen:
    signum: int | None = None
    way_out = "; run the same command again to go on"  # the end of the message
    time = 0.0
    is_handled = False  # a signal is being handled
    is_repeated = False  # a thread sends a signal again until its exception is raised


def block_signals() -> None:
    """Let signals wait until ``stop_at_signals``; before it nothing handles them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def stop_at_signals() -> None:
    """Raise ``Stopped`` at each signal from now on, also at one that was blocked until now.

    Further signals do nothing for ``PATIENCE`` seconds: Slurm and launchers send several, and they
    must not interrupt the clean-up after the first. Later ones raise again, since a library may
    have swallowed the first exception.
    """
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # under nohup, or in the background
            signal.signal(signum, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def nothing_is_saved() -> None:
    """Leave out of the message about a signal that the same command goes on with the work."""
    _Seen.way_out = ""


def ignore_signals() -> None:
    """Ignore signals from now on: the exit code is decided, and the interpreter is closing."""
    _Seen.is_repeated = False
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def first_signal() -> int | None:
    """Return the first signal that came, also if its exception was swallowed; None if none did."""
    return _Seen.signum


def _stop(signum: int, frame: FrameType | None) -> None:
    if _Seen.is_handled:  # many signals at once would nest handlers until the stack is full
        return
    _Seen.is_handled = True
    if _would_be_lost(frame):
        # An import may catch every exception or stay half-loaded, and Python ignores what __del__
        # raises: send the signal again.
        if not _Seen.is_repeated:
            _Seen.is_repeated = True
            threading.Thread(target=_repeat, args=(signum,), daemon=True).start()
        _Seen.is_handled = False
        return
    _Seen.is_handled = _Seen.is_repeated = False
    now = time.monotonic()
    if _Seen.signum is None or now > _Seen.time + PATIENCE:
        _Seen.signum, _Seen.time = _Seen.signum or signum, now
        name = signal.Signals(_Seen.signum).name
        raise Stopped(f"stopped by {name}{_Seen.way_out}", _Seen.signum)


def _repeat(signum: int) -> None:
    """Send the signal until it is handled: one just before a wait in C doesn't end the wait."""
    while _Seen.is_repeated:
        time.sleep(0.1)
        if _Seen.is_repeated:
            os.kill(os.getpid(), signum)
        if signal.getsignal(signum) is not _stop:  # the training loop handles it now
            _Seen.is_repeated = False


def _would_be_lost(frame: FrameType | None) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_filename == "<frozen importlib._bootstrap>" or code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
