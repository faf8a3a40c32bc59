"""Write the shards of a split, and continue an unfinished one after a kill."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt_cli.core.files import sha256_of, sync_to_disk
from minigpt_cli.data.dataset_manifest import Shard, damaged

_HEADER = 128  # bytes before the tokens; numpy pads a 1-D header to this whatever the length


class ShardWriter:
    """Append tokens to the shards of one split.

    Every shard but the last holds ``shard_tokens`` tokens. The files depend on the tokens alone,
    not on how they arrive or where writing was interrupted.

    To continue after a kill, save ``finished`` and ``pending`` after a `sync` and hand them to a
    new writer. It cuts off everything written later.

    Attributes:
        finished: the finished shards.
        pending: tokens in the unfinished shard.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        dtype: str,
        shard_tokens: int,
        finished: tuple[Shard, ...] = (),
        pending: int = 0,
    ):
        """Open the unfinished shard if there is one.

        Args:
            directory: the dataset's directory.
            split: its name begins the files' names.
            dtype: data type of the tokens.
            shard_tokens: tokens per shard.
            finished: shards that an earlier writer finished.
            pending: tokens in the shard that it left unfinished.

        Raises:
            Damaged: the unfinished shard holds fewer tokens than ``pending``.
        """
        assert shard_tokens > 0, shard_tokens
        assert 0 <= pending < shard_tokens, (pending, shard_tokens)
        self.finished = list(finished)
        self.pending = 0
        self._directory = directory
        self._split = split
        self._dtype = np.dtype(dtype)
        self._shard_tokens = shard_tokens
        self._stream: io.FileIO | None = None
        if pending:
            self._continue(pending)

    def write(self, tokens: NDArray[Any]) -> None:
        """Append ``tokens``, a 1-D array of the dataset's data type."""
        assert tokens.dtype == self._dtype, (tokens.dtype, self._dtype)
        while len(tokens):
            if self._stream is None:
                self._file(".partial").unlink(missing_ok=True)  # a link may lead elsewhere
                self._stream = io.FileIO(self._file(".partial"), "x")
                _write_all(self._stream, npy_header(self._dtype, self._shard_tokens))
            part = tokens[: self._shard_tokens - self.pending]
            _write_all(self._stream, np.ascontiguousarray(part).view(np.uint8).data)
            self.pending += len(part)
            tokens = tokens[len(part) :]
            if self.pending == self._shard_tokens:
                self._finish()

    def sync(self) -> None:
        """Flush everything written to disk."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def finish(self) -> tuple[Shard, ...]:
        """Finish the last shard and return all of them."""
        if self._stream is not None:
            self._finish()
        return tuple(self.finished)

    def close(self) -> None:
        """Close the unfinished shard as it is."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _file(self, ending: str = "") -> Path:
        return self._directory / f"{self._split}-{len(self.finished):05d}.npy{ending}"

    def _continue(self, pending: int) -> None:
        partial, whole = self._file(".partial"), self._file()
        if not partial.exists() and whole.exists():  # finished after the last `sync`
            whole.rename(partial)
        size = _HEADER + pending * self._dtype.itemsize
        if not partial.exists() or partial.stat().st_size < size:
            raise damaged(partial, f"should hold {pending} tokens by now")
        self._stream = io.FileIO(partial, "r+")
        self._stream.truncate(size)
        # `_finish` may have written a shorter length into the header
        _write_all(self._stream, npy_header(self._dtype, self._shard_tokens))
        self._stream.seek(size)
        self.pending = pending

    def _finish(self) -> None:
        assert self._stream is not None
        if self.pending != self._shard_tokens:
            self._stream.seek(0)
            _write_all(self._stream, npy_header(self._dtype, self.pending))
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._stream = None
        file = self._file()
        self._file(".partial").rename(file)
        sync_to_disk(self._directory)
        # Hashed now and not while writing, because the last shard's header has just changed
        size, digest = file.stat().st_size, sha256_of(file)
        self.finished.append(Shard(file.name, self.pending, size, digest))
        self.pending = 0


def npy_header(dtype: np.dtype[Any], length: int) -> bytes:
    """Return the header of a 1-D .npy file, ``_HEADER`` bytes."""
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype.newbyteorder("<"))
    entry = {"descr": descr, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(stream, entry)
    header = stream.getvalue()
    assert len(header) == _HEADER, len(header)
    return header


def _write_all(stream: io.FileIO, content: bytes | memoryview) -> None:
    view = memoryview(content)
    while len(view):  # an unbuffered write may take only a part
        written = stream.write(view)
        assert written is not None
        view = view[written:]
