"""status.json: how the run's last process ended, for scripts that can't see its exit code.

The file also keeps the name under which trackers know the run.

This module imports no torch, because the launcher of ``--nproc`` writes the file too.
"""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import EXIT_INTERRUPTED, EXIT_STOPPED, Diverged, UserError
from minigpt_cli.core.files import create_file
from minigpt_cli.core.reading import read_json
from minigpt_cli.core.run_dir import STATUS

_TRACKING = "tracking"
_NAMES = {Diverged.exit_code: "diverged", EXIT_STOPPED: "stopped", EXIT_INTERRUPTED: "stopped"}


def status_name(exit_code: int) -> str:
    """Return ``status`` of a run that an error with this exit code ended."""
    return _NAMES.get(exit_code, "failed")


def read_status(directory: Path) -> dict[str, Any]:
    """Read a run's status.json; empty if there is none or it can't be read."""
    try:
        return read_json(directory / STATUS)
    except UserError:
        return {}


def write_status(
    directory: Path, status: str, exit_code: int | None, step: int | None, message: str
) -> None:
    """Replace a run's status.json, but keep what ``write_tracking`` wrote.

    A full disk is no error: the file only repeats an outcome.

    Args:
        status: running, finished, stopped, diverged or failed.
        exit_code: of the command; None while it runs.
        step: the last step; None if it isn't known.
        message: the error in one line; empty if there was none.
    """
    content: dict[str, Any] = {
        "status": status,
        "exit_code": exit_code,
        "step": step,
        "message": message,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }
    tracking = read_status(directory).get(_TRACKING)
    _replace(directory, content if tracking is None else content | {_TRACKING: tracking})


def read_tracking(directory: Path) -> Any:
    """Return what ``write_tracking`` wrote; None if it isn't there. Anybody may have written it."""
    return read_status(directory).get(_TRACKING)


def write_tracking(directory: Path, tracking: dict[str, Any]) -> None:
    """Note in status.json under which name trackers know the run; the rest stays.

    It lies there and not in the first checkpoint, so that it outlives a kill before that one.
    """
    _replace(directory, read_status(directory) | {_TRACKING: tracking})


def _replace(directory: Path, content: dict[str, Any]) -> None:
    temporary = directory / f".{STATUS}"
    try:
        create_file(temporary, (json.dumps(content, indent=2) + "\n").encode())
        temporary.replace(directory / STATUS)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
