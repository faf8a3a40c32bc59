"""Compare every byte of a dataset with its manifest, and remember which files were as recorded.

The memory is one file per dataset in the user's cache directory. A file counts as verified while
its size, times, inode and recorded sha256 are those of then. A file system that only one machine
sees is remembered until that machine restarts.
"""

import hashlib
import os
import threading
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from minigpt_cli.core.cgroup import usable_cores
from minigpt_cli.core.reading import build
from minigpt_cli.core.storage import Storage, storage_of
from minigpt_cli.core.user_cache import read_cached, write_cached
from minigpt_cli.data.dataset_manifest import DatasetManifest, Shard
from minigpt_cli.data.file_checks import FileState, file_states, shard_problem

_FORMAT = 1
_MOST_THREADS = 8
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class _Memory:
    """The content of a dataset's file in the cache directory.

    Attributes:
        format: ``_FORMAT``.
        dataset: its directory.
        storage: where it lies.
        verified: a file's name -> what ``_entry`` returned when its content was as recorded.
    """

    format: int
    dataset: str
    storage: Storage
    verified: dict[str, str]


def hash_of(descriptor: int, stop: threading.Event | None = None) -> str:
    """Return the sha256 (hex) of an open file, from its first byte.

    Args:
        descriptor: of the file; its position is not used.
        stop: ends the work early, with some other result, when it is set.

    Raises:
        OSError: the file can't be read.
    """
    digest, position = hashlib.sha256(), 0
    buffer = bytearray(_READ_BYTES)
    while count := os.preadv(descriptor, [buffer], position):
        digest.update(memoryview(buffer)[:count])
        position += count
        if stop is not None and stop.is_set():
            break
    return digest.hexdigest()


def changed_content(
    path: Path,
    files: Iterable[tuple[Shard, str]],
    known: Collection[str] = (),
    ranks: int = 1,
) -> dict[str, str]:
    """Compare files of the dataset in the directory ``path`` with the manifest, in threads.

    Args:
        path: the dataset's directory.
        files: the files, with their data types.
        known: names of files that need no comparison.
        ranks: processes on this machine that do the same.

    Returns:
        For every file that differs: its name -> what is wrong with it.
    """
    stop = threading.Event()

    def problem(shard: Shard, dtype: str) -> str | None:
        if (found := shard_problem(path / shard.file, shard, dtype)) is not None:
            return found
        try:
            descriptor = os.open(path / shard.file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                same = hash_of(descriptor, stop) == shard.sha256
            finally:
                os.close(descriptor)
        except OSError as error:
            return f"can't be read ({error.strerror})"
        return None if same else "its content doesn't match its sha256"

    unknown = [each for each in files if each[0].file not in known]
    threads = max(1, min(_MOST_THREADS, len(unknown), usable_cores() // ranks))
    with ThreadPoolExecutor(threads, thread_name_prefix="sha256") as pool:
        try:
            found = pool.map(lambda each: problem(*each), unknown)
            return {shard.file: p for (shard, _), p in zip(unknown, found, strict=True) if p}
        finally:
            stop.set()  # after a signal: the threads must not read to the end
            pool.shutdown(wait=False, cancel_futures=True)


def recall(path: Path, manifest: DatasetManifest, states: dict[str, FileState]) -> set[str]:
    """Return the names of the files that were verified before and haven't changed since.

    Args:
        path: the dataset's directory.
        manifest: of the dataset.
        states: of its files.
    """
    dataset, storage, cached = _place(path, states)
    try:
        memory = build(_Memory, read_cached(cached))
    except ValueError:
        return set()
    if (memory.format, memory.dataset, memory.storage) != (_FORMAT, dataset, storage):
        return set()
    return {
        shard.file
        for shard, _ in manifest.files()
        if (state := states.get(shard.file)) is not None
        and memory.verified.get(shard.file) == _entry(shard, state)
    }


def remember(
    path: Path, manifest: DatasetManifest, states: dict[str, FileState], damaged: Collection[str]
) -> None:
    """Remember that the files of a dataset are as recorded.

    A file that has changed meanwhile, or just before, is left out.

    Args:
        path: the dataset's directory.
        manifest: of the dataset.
        states: of its files before they were compared.
        damaged: names of files that are not as recorded.
    """
    now = file_states(path, manifest)
    verified = {
        shard.file: _entry(shard, state)
        for shard, _ in manifest.files()
        if shard.file not in damaged
        and (state := states.get(shard.file)) is not None
        and state.is_settled
        and state == now.get(shard.file)
    }
    dataset, storage, cached = _place(path, states)
    if verified or read_cached(cached) is not None:
        write_cached(cached, asdict(_Memory(_FORMAT, dataset, storage, verified)))


def storage_key(states: dict[str, FileState]) -> str:
    """Return a hash that is equal in processes that see the same files of a dataset.

    It differs between machines with copies of their own, also of equal content.

    Args:
        states: of the files.
    """
    storage = storage_of({state.device for state in states.values()})
    found = sorted((name, state.text) for name, state in states.items())
    return hashlib.sha256(repr((storage, found)).encode()).hexdigest()


def _entry(shard: Shard, state: FileState) -> str:
    return f"{state.text} {shard.sha256}"


def _place(path: Path, states: dict[str, FileState]) -> tuple[str, Storage, str]:
    """Return a dataset's directory, its storage, and the name of its file in the cache."""
    dataset = os.path.realpath(path)
    storage = storage_of({state.device for state in states.values()})
    key = hashlib.sha256(os.fsencode(f"{dataset}\0{storage.name}")).hexdigest()
    return dataset, storage, f"verified-{key[:32]}.json"
