"""Lock a run directory, so that one process trains in it at a time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import locked
from minigpt_cli.core.run_dir import LOCK


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
