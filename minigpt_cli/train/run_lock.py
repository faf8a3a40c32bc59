"""Lock a run directory and keep its status.json true while a process trains in it."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.core.errors import Outcome, UserError
from minigpt_cli.core.files import locked
from minigpt_cli.core.run_dir import LOCK
from minigpt_cli.core.status import write_status
from minigpt_cli.distributed.world import end_with, recorded_by

_STATUS = {3: "diverged", 75: "stopped", 130: "stopped"}  # by exit code


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Create the run directory if needed, and hold its lock in the ``with`` block.

    Raises:
        UserError: another process holds it, or the directory can't be written to.
    """
    with ExitStack() as held:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            busy = f"{directory}: another process is training in it"
            held.enter_context(locked(directory / LOCK, busy))
        except OSError as error:
            raise UserError(f"{directory}: can't be written to: {error.strerror}") from None
        yield


@dataclass
class StatusRecord:
    """What status.json is written from.

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
