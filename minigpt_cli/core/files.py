"""Files that are written whole or not at all, and checksums."""

import hashlib
import os
from pathlib import Path


def write_atomically(file: Path, content: bytes) -> None:
    """Replace ``file`` so that, whenever the power goes, it holds the old content or the new."""
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
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
