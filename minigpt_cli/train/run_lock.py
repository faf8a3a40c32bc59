"""Lock a run directory and keep its status.json true while a process trains in it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.core.errors import Outcome, UserError
from minigpt_cli.core.run_dir import LOCK
from minigpt_cli.core.status import write_status
from minigpt_cli.distributed.world import end_with, recorded_by

_STATUS = {3: "diverged", 75: "stopped", 130: "stopped"}  # by exit code


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Create the run directory if needed, and hold its lock in the ``with`` block.

    Raises:
        UserError: another process holds it, or the directory can't be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{directory}: can't be written to: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory}: another process is training in it") from None
        yield
    finally:
        os.close(lock)


@dataclass
class StatusRecord:
    """The source of status.json.

    Attributes:
        state: whose step is recorded; None until it is known.
    """

    state: RunState | None = None


@contextmanager
def recorded(directory: Path) -> Iterator[StatusRecord]:
    """Write status.json when the ``with`` block begins and when it ends, however it ends."""
    record = StatusRecord()

    def write(status: str, exit_code: int | None, message: str) -> None:
        step = record.state.step if record.state is not None else None
        write_status(directory, status, exit_code, step, message)

    def write_outcome(outcome: Outcome) -> None:
        write(_STATUS.get(outcome.code, "failed"), outcome.code, outcome.message)

    write("running", None, "")
    try:
        with recorded_by(write_outcome):
            yield record
    except BaseException as error:
        write_outcome(end_with(error))
        raise
    write("finished", 0, "")
