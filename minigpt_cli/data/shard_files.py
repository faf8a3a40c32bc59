"""Read entries of a dataset's .npy files by position, with a bounded number of open files.

Training reads a few KB at random places. A memory map would read 128 KB or more around each of
them from the disk, and hold Python's lock while it waits.
"""

import errno
import os
import resource
import stat
import threading
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt_cli.data.dataset_manifest import Shard, damaged
from minigpt_cli.data.file_checks import FileState
from minigpt_cli.data.verification import hash_of

_MOST_OPEN = 4096  # opening a file costs about as much as reading a sequence


class _OpenFile:
    """An open file, closed with its last user: one thread may read it while another drops it."""

    def __init__(self, file: Path):
        self.descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardFiles:
    """The entries of several shards. Threads may share it.

    Attributes:
        dtype: data type of the entries.
    """

    def __init__(
        self, directory: Path, shards: tuple[Shard, ...], dtype: str, states: dict[str, FileState]
    ):
        """Prepare to read; no file is opened yet.

        Args:
            directory: the dataset's directory.
            shards: the files. Their headers were checked.
            dtype: data type of the entries.
            states: of the files when they were checked, by name.
        """
        self.dtype = np.dtype(dtype)
        self._directory = directory
        self._shards = shards
        self._states = dict(states)
        self._open: dict[int, _OpenFile] = {}
        self._lock = threading.Lock()

    def read(self, shard: int, start: int, out: NDArray[Any]) -> None:
        """Fill ``out`` [n] with the entries of a shard from position ``start`` on.

        Args:
            shard: its number.
            start: the position of the first entry.
            out: contiguous, of ``dtype``.

        Raises:
            Damaged: the file ends too early, can't be read, or is another one than was checked.
        """
        entry = self._shards[shard]
        # The entries end where the file does
        offset = entry.bytes_on_disk - (entry.tokens - start) * self.dtype.itemsize
        try:
            opened = self._open.get(shard) or self._opened(shard)
            done = os.preadv(opened.descriptor, [out.data], offset)
            while done < out.nbytes:  # Linux reads at most 2 GiB at once
                rest = out.view(np.uint8)[done:]
                if not (count := os.preadv(opened.descriptor, [rest.data], offset + done)):
                    raise self._damaged(shard, f"ends at byte {offset + done:,}")
                done += count
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # nothing is wrong with the file
                raise
            problem = f"can't be read at byte {offset:,} ({error.strerror})"
            raise self._damaged(shard, problem) from None

    def _opened(self, shard: int) -> _OpenFile:
        """Open a shard's file. If another file has its place, compare all of it.

        Raises:
            Damaged: its content isn't as recorded.
        """
        entry = self._shards[shard]
        opened = _OpenFile(self._directory / entry.file)
        found = os.fstat(opened.descriptor)
        state, checked = FileState.of(found), self._states.get(entry.file)
        if checked is None or checked.may_have_changed(state):
            is_whole = stat.S_ISREG(found.st_mode) and state.bytes == entry.bytes_on_disk
            if not is_whole or hash_of(opened.descriptor) != entry.sha256:
                raise self._damaged(shard, "was changed since it was checked")
            self._states[entry.file] = state
        with self._lock:
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            most = _MOST_OPEN if limit < 0 else min(_MOST_OPEN, limit // 4)  # two splits, and more
            while self._open and len(self._open) >= most:
                del self._open[next(iter(self._open))]
            self._open[shard] = opened
        return opened

    def _damaged(self, shard: int, problem: str) -> Exception:
        return damaged(self._directory / self._shards[shard].file, problem)
