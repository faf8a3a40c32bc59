"""Compare the files of a dataset with its manifest: presence, size, header."""

import io
import os
import stat
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import sha256_of
from minigpt_cli.core.reading import MAX_TOKENIZER_BYTES
from minigpt_cli.data.dataset_manifest import TOKENIZER, DatasetManifest, Shard

_USUAL_HEADER = 128  # bytes; numpy pads the header of every 1-D array to this
_SETTLED_NS = 3_000_000_000  # the coarsest file systems count time in steps of 2 s
_WRONG_HEADER = "its header is not that of a shard"


@dataclass(frozen=True)
class FileState:
    """The state of a file, which changes when the file is written to or replaced.

    Attributes:
        bytes: its size.
        mtime_ns: time of the last change of its content.
        ctime_ns: time of the last change of its content, name or mode; no program can set it.
        inode: its number in the file system.
        device: number of the file system, which may be another one after a restart.
        is_settled: whether a later change must get another time.
    """

    bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int = field(compare=False)
    is_settled: bool = field(compare=False)

    @classmethod
    def of(cls, found: os.stat_result) -> "FileState":
        """Return the state in the result of ``os.stat`` or ``os.fstat``."""
        changed_ns = max(found.st_mtime_ns, found.st_ctime_ns)
        return cls(
            bytes=found.st_size,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=found.st_ctime_ns,
            inode=found.st_ino,
            device=found.st_dev,
            is_settled=time.time_ns() - changed_ns > _SETTLED_NS,
        )

    @property
    def text(self) -> str:
        """The parts that are compared, as text."""
        return f"{self.bytes} {self.mtime_ns} {self.ctime_ns} {self.inode}"

    def may_have_changed(self, later: "FileState") -> bool:
        """Return whether the content may have changed until ``later``.

        Some network file systems give a file another inode now and then.
        """
        return (self.bytes, self.mtime_ns) != (later.bytes, later.mtime_ns)


def file_states(path: Path, manifest: DatasetManifest) -> dict[str, FileState]:
    """Return the state of each shard of the dataset in the directory ``path``, by its name.

    A shard that is missing has none.
    """
    states = {}
    for shard, _ in manifest.files():
        try:
            states[shard.file] = FileState.of((path / shard.file).stat())
        except OSError:
            continue
    return states


def problems(path: Path, manifest: DatasetManifest) -> dict[str, str]:
    """Compare the files of a dataset with its manifest, without reading every byte.

    Args:
        path: the dataset's directory.
        manifest: of the dataset.

    Returns:
        For every file that differs: its name -> what is wrong with it.
    """
    found = {TOKENIZER: _tokenizer_problem(path / TOKENIZER, manifest)}
    for shard, dtype in manifest.files():
        found[shard.file] = shard_problem(path / shard.file, shard, dtype)
    return {file: problem for file, problem in found.items() if problem}


def shard_problem(file: Path, shard: Shard, dtype: str) -> str | None:
    """Return what is wrong with a shard's size or header, None if both are as recorded."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe would block
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                return "is not a regular file"
            if found.st_size != shard.bytes_on_disk:
                return f"is {found.st_size:,} bytes instead of {shard.bytes_on_disk:,}"
            header = os.pread(descriptor, _USUAL_HEADER, 0)
            if (rest := _header_bytes(header) - len(header)) > 0:
                header += os.pread(descriptor, rest, len(header))
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read ({error.strerror})"
    try:
        tokens, found_dtype, offset = _parse_header(header)
    except Exception:  # NumPy parses the header as Python, so all of its errors may come
        return _WRONG_HEADER
    if (tokens, found_dtype) != (shard.tokens, np.dtype(dtype)):
        return f"its header doesn't say {shard.tokens:,} entries of {dtype}"
    if offset + shard.tokens * found_dtype.itemsize != shard.bytes_on_disk:
        return _WRONG_HEADER  # readers rely on it
    return None


def _header_bytes(beginning: bytes) -> int:
    """Return the length of the header of an .npy file of version 1, from its first 10 bytes."""
    return 10 + int.from_bytes(beginning[8:10], "little")


@lru_cache(maxsize=64)
def _parse_header(header: bytes) -> tuple[int, np.dtype, int]:
    """Return (entries, dtype, offset of the first one) of a 1-D .npy file's header.

    It is the same in all shards of a split but the last one, and parsing takes a while.

    Raises:
        Exception: it is no such header.
    """
    stream = io.BytesIO(header)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("another version")
    (length,), is_fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    if is_fortran:
        raise ValueError("not in C's order")
    return length, dtype, stream.tell()


def _tokenizer_problem(file: Path, manifest: DatasetManifest) -> str | None:
    """Return what is wrong with tokenizer.json, None if its bytes or meaning are as recorded."""
    from minigpt_cli.data.tokenizer import load_tokenizer, tokenizer_fingerprint

    try:
        if file.exists() and not file.is_file():
            return "is not a regular file"
        if file.stat().st_size > MAX_TOKENIZER_BYTES:  # a hole would be hashed for hours
            return f"is larger than {MAX_TOKENIZER_BYTES:,} bytes"
        if sha256_of(file) == manifest.tokenizer_sha256:
            return None
        if tokenizer_fingerprint(load_tokenizer(file)) == manifest.tokenizer_fingerprint:
            return None  # another tool saved the same tokenizer
    except OSError as error:
        return error.strerror or str(error)
    except UserError:
        pass
    return "is not the tokenizer that the dataset was made with"
