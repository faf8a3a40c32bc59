"""Files that are written whole or not at all, checksums, and locks."""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from minigpt_cli.core.errors import UserError


def write_atomically(file: Path, content: bytes) -> None:
    """Replace ``file``: after a power failure it holds the old content or the new."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk its bytes are wanted
        raise
    sync_directory(file.parent)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to disk: names, renames and deletions in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def locked(file: Path, busy_message: str) -> Iterator[IO[str]]:
    """Hold an exclusive lock on ``file``, which is created if it is missing.

    The system releases the lock however the process ends. The file stays.

    Args:
        file: the lock file; its directory must exist.
        busy_message: what to tell the user when another process holds the lock.

    Yields:
        The open lock file.

    Raises:
        UserError: another process holds the lock.
        OSError: the file can't be created.
    """
    with file.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy_message) from None
        yield stream
