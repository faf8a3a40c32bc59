"""status.json: how the run's last process ended, for scripts that can't see its exit code."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.distributed import world as worlds
from minigpt_cli.errors import Outcome

_STATUS = {3: "diverged", 75: "stopped", 130: "stopped"}  # by exit code


@dataclass
class Record:
    """What status.json is written from."""

    directory: Path
    state: RunState | None = None  # once it is known


@contextmanager
def recorded(directory: Path) -> Iterator[Record]:
    """Keep status.json true while a run is made ready and trained in the ``with`` block."""
    record = Record(directory)

    def ended(outcome: Outcome) -> None:
        _write(record, _STATUS.get(outcome.code, "failed"), outcome.code, outcome.message)

    _write(record, "running", None, "")
    try:
        with worlds.recorded_by(ended):
            yield record
    except BaseException as error:
        ended(worlds.end_with(error))
        raise
    _write(record, "finished", 0, "")


def _write(record: Record, status: str, exit_code: int | None, message: str) -> None:
    directory = record.directory
    content = {
        "status": status,
        "exit_code": exit_code,
        "step": record.state.step if record.state is not None else None,
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
