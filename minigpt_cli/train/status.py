"""status.json: how the run's last process ended, for scripts that can't see its exit code."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.distributed import world as worlds
from minigpt_cli.errors import Outcome

_STATUS = {3: "diverged", 75: "stopped", 130: "stopped"}  # by exit code


@contextmanager
def recorded(directory: Path, state: RunState) -> Iterator[None]:
    """Keep status.json true while a run is trained in the ``with`` block."""

    def ended(outcome: Outcome) -> None:
        status = _STATUS.get(outcome.code, "failed")
        _write(directory, state, status, outcome.code, outcome.message)

    _write(directory, state, "running", None, "")
    try:
        with worlds.recorded_by(ended):
            yield
    except BaseException as error:
        ended(worlds.end_with(error))
        raise
    _write(directory, state, "finished", 0, "")


def _write(
    directory: Path, state: RunState, status: str, exit_code: int | None, message: str
) -> None:
    content = {
        "status": status,
        "exit_code": exit_code,
        "step": state.step,
        "message": message,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "pid": os.getpid(),
    }
    temporary = directory / ".status.json"
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(directory / "status.json")
    except OSError:  # a full disk must not hide the error that is being reported
        temporary.unlink(missing_ok=True)
