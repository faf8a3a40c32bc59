"""Lock a run directory, so that one process trains in it at a time."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import locked, removed_if_empty
from minigpt_cli.core.run_dir import CHECKPOINTS, INCIDENTS, LOCK, STATUS
from minigpt_cli.distributed.join import session


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Create the run directory if needed, and hold its lock in the ``with`` block.

    If a user's error ends the run before it has written anything but its status, what was created
    is removed again.

    Raises:
        UserError: another process holds it, the directory can't be written to, or a link in it
            leads to another directory.
    """
    with removed_if_empty(directory), ExitStack() as held:
        _create_and_lock(directory, held)
        try:
            yield
        except UserError as error:
            # Scripts that can't see the exit code, as under torchrun, need status.json.
            is_empty = {*os.listdir(directory)} <= {LOCK, STATUS}
            if type(error) is UserError and session.info is None and is_empty:
                for name in (STATUS, LOCK):
                    (directory / name).unlink(missing_ok=True)
            raise


def _create_and_lock(directory: Path, held: ExitStack) -> None:
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
