"""Files and directories that appear whole or not at all; checksums and locks."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from minigpt_cli.core.errors import UserError


def write_atomically(file: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace ``file``: after a crash or a power cut it holds the old content or the new.

    Args:
        file: Its directory must exist.
        content: All of the new content.
        mode: Who may read and write it, less what the umask takes.

    Raises:
        OSError: The disk is full or can't be written to; ``file`` is as it was.
    """
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        create_file(temporary, content, mode)
        sync_to_disk(temporary)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise
    sync_to_disk(file.parent)


def create_file(file: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a new file. What has its name is replaced: of a link, the link and not its target.

    Raises:
        OSError: The disk is full or can't be written to.
    """
    file.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(file, flags, mode), "wb") as stream:
        stream.write(content)


def write_new_file(file: Path, content: bytes) -> None:
    """Write a file that doesn't exist yet; if that fails, nothing is left.

    Raises:
        FileExistsError: It exists.
        OSError: The disk is full or can't be written to.
    """
    with file.open("xb") as stream:
        try:
            stream.write(content)
            stream.flush()
        except BaseException:  # also a signal
            file.unlink(missing_ok=True)
            raise


def nearest_existing(path: Path) -> Path:
    """Return a path, or its nearest parent that exists: on that disk it is, or will be."""
    return next(each for each in (path, *path.absolute().parents) if each.exists())


def sync_to_disk(path: Path) -> None:
    """Flush a file's content, or a directory's list of names, to the disk (fsync).

    Raises:
        OSError: The disk is full or can't be written to.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: Path) -> str:
    """Return the sha256 (hex) of a file's content.

    Raises:
        OSError: The file can't be read.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def json_checksum(content: dict[str, Any]) -> str:
    """Return the sha256 (hex) of a JSON object; the order of its keys doesn't matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def locked(file: Path, busy: str) -> Iterator[IO[str]]:
    """Hold an exclusive lock in the ``with`` block. It is released even if the process is killed.

    Args:
        file: The lock file; it is created if needed, and stays.
        busy: The message of the error if another process holds the lock.

    Yields:
        The open lock file.

    Raises:
        UserError: Another process holds the lock.
        OSError: The file can't be created, or is a link.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC  # a link may lead elsewhere
    with open(os.open(file, flags, 0o666), "a") as stream:
        for wait in (0.1, 0.1, 0.0):  # `minigpt runs` holds locks for a moment, to see if it can
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(wait)
        else:
            raise UserError(busy)
        if not is_same_file(stream, file):  # another process has just removed or renamed it
            raise UserError(busy)
        yield stream


def is_same_file(stream: IO[Any], path: Path) -> bool:
    """Return whether ``path`` names the open file ``stream``."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """If the ``with`` block fails, remove the directory and its parents, as far as they are new."""
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for each in new:
                each.rmdir()
        raise


@contextlib.contextmanager
def whole_directory(out: Path, replace: bool = False) -> Iterator[Path]:
    """Give a temporary directory to write to; rename it to ``out`` when the ``with`` block ends.

    If the block raises, the temporary directory is removed and ``out`` is as it was.

    Args:
        out: The final directory. Missing parents are created.
        replace: Replace ``out`` if it exists. Else it must be missing or an empty directory.

    Yields:
        The temporary directory, beside ``out``. Only its files are flushed, not subdirectories.

    Raises:
        UserError: ``out`` exists and is not to be replaced, or its parent can't be written to.
        OSError: The disk is full, or fails.
    """
    out = Path(os.path.abspath(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_directories(out)
        if not replace:
            _refuse_existing(out)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-{os.getpid()}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"{out}: can't be written to: {os_reason(error)}") from None
    try:
        folder.chmod(0o755 & ~_umask())
        yield folder
        for file in folder.iterdir():
            sync_to_disk(file)
        sync_to_disk(folder)
        if not replace:
            _refuse_existing(out)  # again: another process may have made it meanwhile
        old = folder.with_name(f"{folder.name}-old")
        if out.exists():
            out.rename(old)
        try:
            folder.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        remove_tree(old)
        sync_to_disk(out.parent)
    finally:
        remove_tree(folder)


def remove_stale_directories(out: Path) -> None:
    """Clean up after processes that were killed in ``whole_directory(out)``.

    Temporary directories of dead processes are removed. If ``out`` was moved aside and nothing
    took its place, it is moved back.
    """
    for stale in out.parent.glob(f".{out.name}-*"):
        match = re.fullmatch(rf"\.{re.escape(out.name)}-(\d+)-\w+(-old)?", stale.name)
        if match is None or Path(f"/proc/{match[1]}").exists():
            continue
        if match[2] and not out.exists():
            stale.rename(out)
        else:
            remove_tree(stale)


def remove_tree(path: Path) -> None:
    """Delete a directory with its content, as far as possible; of a link, only the link."""
    if path.is_symlink() or not path.is_dir():  # rmtree would open a pipe, and wait
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def os_reason(error: OSError) -> str:
    """Return why the system refused, in a few words."""
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return error.strerror or str(error)


def _refuse_existing(out: Path) -> None:
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"{out}: already exists; choose another directory, or delete it")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
