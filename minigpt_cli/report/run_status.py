"""How a run stands: what its status.json says, and whether a process holds its lock."""

import fcntl
import os
import socket
import stat
from pathlib import Path
from typing import Any

from minigpt_cli.core.run_dir import LOCK

STATUSES = ("running", "finished", "stopped", "diverged", "failed")  # of status.json


def status_of(run: Path, status: dict[str, Any]) -> str:
    """Return one of ``STATUSES``, killed or unknown.

    A killed run's file still says running, but no process holds the lock. It is unknown if the run
    is on another machine: its locks may not be seen here, although the files are.

    Args:
        run: the run directory.
        status: the content of its status.json.
    """
    name = status.get("status")
    if name not in STATUSES:
        return "unknown"
    if name != "running" or (held := _is_locked(run)) is True:
        return str(name)
    is_here = status.get("host") in (None, socket.gethostname())
    return "killed" if is_here and held is False else "unknown"


def _is_locked(run: Path) -> bool | None:
    """Return whether a process holds the run's lock; None if that can't be seen.

    The lock is taken for a moment if it is free; a process that starts in this moment tries again.
    """
    try:
        descriptor = os.open(run / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a disk without locks
            return None
    return False
