"""Lock a run directory, so that one process trains in it at a time."""

import contextlib
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import locked
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
    first = _first_missing(directory)
    try:
        with ExitStack() as held:
            _create_and_lock(directory, held)
            yield
    except UserError as error:
        # Scripts that can't see the exit code, as under torchrun, need status.json.
        if type(error) is UserError and first is not None and session.info is None:
            _remove_if_empty(directory, first)
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


def _first_missing(directory: Path) -> Path | None:
    """Return the topmost directory that has to be created for this one; None if it is there."""
    missing = None
    for each in (directory, *directory.parents):
        if each.exists():
            break
        missing = each
    return missing


def _remove_if_empty(directory: Path, first: Path) -> None:
    """Remove a directory that holds nothing but how the run ended, and its parents up to one."""
    if {*os.listdir(directory)} <= {LOCK, STATUS}:
        for name in (LOCK, STATUS):
            (directory / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another run may have begun there
            for each in (directory, *directory.parents):
                each.rmdir()
                if each == first:
                    break
