"""status.json: how a run's last process ended, for scripts that can't see its exit code."""

import json
import os
import socket
import time
from pathlib import Path

from minigpt_cli.core.run_dir import STATUS


def write_status(
    directory: Path, status: str, exit_code: int | None, step: int | None, message: str
) -> None:
    """Write status.json. A write that fails is ignored: it must not hide the error it reports.

    Args:
        directory: the run directory.
        status: running, finished, stopped, diverged or failed.
        exit_code: the command's exit code; None while it runs.
        step: the last finished step; None if it isn't known.
        message: one line for a person.
    """
    content = {
        "status": status,
        "exit_code": exit_code,
        "step": step,
        "message": message,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }
    temporary = directory / f".{STATUS}"
    try:  # without fsync: the file tells how a process ended, not what is saved
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(directory / STATUS)
    except OSError:
        temporary.unlink(missing_ok=True)
