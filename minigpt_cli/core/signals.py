"""Signals that end a command, from its first import until how it ends is decided.

They raise ``Stopped`` wherever the command is. Only the training loop, which has more to lose,
looks at them between two steps (train/stop.py).
"""

import os
import signal
import threading
import time
from types import FrameType

from minigpt_cli.core.errors import Stopped

# SIGUSR1: often what Slurm's --signal sends. SIGHUP: the terminal is gone.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PATIENCE = 5.0  # seconds for the first signal's exception to get through


class _Seen:
    signum: int | None = None
    time = 0.0
    is_handled = False  # one is being looked at, or comes again in a moment


def block_signals() -> None:
    """Let signals wait, while there is nobody yet who would handle them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def stop_at_signals() -> None:
    """From here on a signal raises ``Stopped``, also one that was held.

    More of them do nothing for a while: Slurm and launchers send several, and what the first one's
    exception cleans up is not to be cut short. After that they raise again, since somewhere in a
    library an ``except Exception`` may have swallowed the first.
    """
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # under nohup, or in the background
            signal.signal(signum, _stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def ignore_signals() -> None:
    """From here on nothing changes how the command ends, while the interpreter is being closed."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def first_signal() -> int | None:
    """The first signal that came, whatever became of its exception."""
    return _Seen.signum


def _stop(signum: int, frame: FrameType | None) -> None:
    if _Seen.is_handled:  # handlers interrupt one another, without an end in a hail of signals
        return
    _Seen.is_handled = True
    if _would_be_lost(frame):
        # Libraries that are imported catch every exception, or are left half-loaded, and Python
        # itself catches what __del__ raises: come again in a moment.
        threading.Timer(0.1, _again, (signum,)).start()
        return
    _Seen.is_handled = False
    now = time.monotonic()
    if _Seen.signum is None or now > _Seen.time + PATIENCE:
        _Seen.signum, _Seen.time = _Seen.signum or signum, now
        raise Stopped(
            f"stopped by {signal.Signals(_Seen.signum).name}; run the same command again to go on",
            _Seen.signum,
        )


def _again(signum: int) -> None:
    _Seen.is_handled = False
    os.kill(os.getpid(), signum)


def _would_be_lost(frame: FrameType | None) -> bool:
    while frame is not None:
        code = frame.f_code
        if code.co_filename == "<frozen importlib._bootstrap>" or code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
