"""Lock a run directory, so that one process trains in it at a time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import locked
from minigpt_cli.core.run_dir import CHECKPOINTS, INCIDENTS, LOCK


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Create the run directory if needed, and hold its lock in the ``with`` block.

    Raises:
        UserError: another process holds it, the directory can't be written to, or a link in it
            leads to another directory.
    """
    with ExitStack() as held:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            busy = f"{directory}: another process is training in it"
            held.enter_context(locked(directory / LOCK, busy))
        except OSError as error:
            raise UserError(f"{directory}: can't be written to: {error.strerror}") from None
        for name in (CHECKPOINTS, INCIDENTS):
            if (directory / name).is_symlink():
                raise UserError(
                    f"{directory / name} is a link, and a run writes and deletes files there: move "
                    "the directory itself here, or move the whole run to the other disk"
                )
        yield
