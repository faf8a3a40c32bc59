"""Time the reading of random sequences against the size of the dataset.

    python -m benchmarks.bench_dataset [--folder DIR] [--rounds 5]

The datasets hold 10^8 to 10^11 tokens in shards of 10^8, as sparse files: 200 GB that take no room.
The last rows read a real file after its pages were dropped from memory. Times are per sequence,
medians of rounds that alternate: this process's CPU time and the clock's. Memory maps, as NumPy
makes them, are beside for comparison. Everything is made in a temporary directory and removed.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from minigpt_cli.data.dataset import TokenSplit
from minigpt_cli.data.dataset_manifest import Shard
from minigpt_cli.data.file_checks import FileState
from minigpt_cli.data.shard_files import ShardFiles
from minigpt_cli.prepare.writer import npy_header

SHARD_TOKENS = 100_000_000
BATCH = 8  # sequences


def sparse_split(folder: Path, tokens: int) -> TokenSplit:
    """Make a split of this many zeros as sparse files."""
    shards, states = [], {}
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(-(-tokens // SHARD_TOKENS)):
        count = min(SHARD_TOKENS, tokens - number * SHARD_TOKENS)
        file = folder / f"train-{number:05d}.npy"
        file.write_bytes(npy_header(np.dtype("uint16"), count))
        os.truncate(file, 128 + 2 * count)
        shards.append(Shard(file.name, count, 128 + 2 * count, ""))
        states[file.name] = FileState.of(file.stat())
    files = ShardFiles(folder, tuple(shards), "uint16", states)
    return TokenSplit(folder, tuple(shards), 1000, 0, files)


def mapped_reader(split: TokenSplit, advice: int | None) -> Callable[[list[int], int], None]:
    """Return a reader by memory maps, all of which stay open."""
    maps = [np.load(split.directory / each.file, mmap_mode="r") for each in split.shards]
    if advice is not None:
        for each in maps:
            each._mmap.madvise(advice)
    arrays = [each.view(np.ndarray) for each in maps]

    def read(ids: list[int], length: int) -> None:
        out = np.empty((len(ids), length + 1), dtype=np.int64)
        for row, number in zip(out, ids, strict=True):
            shard, start = divmod(number * length, SHARD_TOKENS)
            part = arrays[shard][start : start + length + 1]
            row[: len(part)] = part

    return read


def drop_pages(split: TokenSplit) -> None:
    """Drop the files' pages from memory."""
    for shard in split.shards:
        descriptor = os.open(split.directory / shard.file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


@contextlib.contextmanager
def measured(count: int, found: list[tuple[float, float, float]]) -> Iterator[None]:
    """Append (CPU us, clock us, KB from the disk) per sequence."""
    cpu, clock, disk = time.process_time(), time.perf_counter(), bytes_from_disk()
    yield
    found.append(
        (
            (time.process_time() - cpu) / count * 1e6,
            (time.perf_counter() - clock) / count * 1e6,
            (bytes_from_disk() - disk) / count / 1e3,
        )
    )


def bytes_from_disk() -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


def random_ids(split: TokenSplit, length: int, count: int, seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    ids = random.integers(0, split.num_sequences(length), count)
    return [ids[at : at + BATCH].tolist() for at in range(0, count, BATCH)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: temporary")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=4000, help="in each round")
    options = parser.parse_args()
    print("| tokens | length | reader | CPU us | clock us | sequences/s | KB from disk |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        sizes = [10**8, 10**9, 10**10, 10**11]
        splits = {f"{size:.0e}": sparse_split(Path(folder, f"{size}"), size) for size in sizes}
        for length in (256, 1024):
            compare(splits, length, options.rounds, options.sequences, maps=length == 256)
        real = Path(folder, "real")
        splits = {"1e8, cold": sparse_split(real, 10**8)}
        with (real / "train-00000.npy").open("r+b") as stream:
            stream.seek(128)
            for _ in range(100):
                stream.write(b"\1\0" * (SHARD_TOKENS // 100))
            os.fsync(stream.fileno())
        for split in splits.values():  # the times of the files have changed
            state = {"train-00000.npy": FileState.of((real / "train-00000.npy").stat())}
            splits["1e8, cold"] = TokenSplit(
                real, split.shards, 1000, 0, ShardFiles(real, split.shards, "uint16", state)
            )
        compare(splits, 256, options.rounds, 400, maps=True, before=drop_pages)


def compare(
    splits: dict[str, TokenSplit],
    length: int,
    rounds: int,
    sequences: int,
    maps: bool,
    before: Callable[[TokenSplit], None] | None = None,
) -> None:
    """Print a row for each split and reader; the rounds of all alternate."""
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for seed in range(rounds):
        for name, split in splits.items():
            readers: dict[str, Callable[[list[int], int], object]] = {
                "ours": lambda ids, n, split=split: split.gather(np.array(ids), n)  # type: ignore[misc]
            }
            if maps:
                readers["map"] = mapped_reader(split, None)
                readers["map, MADV_RANDOM"] = mapped_reader(split, 1)
            for number, (reader, read) in enumerate(readers.items()):
                if before is not None:
                    before(split)
                # Other sequences for each reader, or the second one would find them in memory
                batches = random_ids(split, length, sequences, 10 * seed + number)
                with measured(sequences, found.setdefault((name, reader), [])):
                    for batch in batches:
                        read(batch, length)
    for (name, reader), rows in found.items():
        cpu, clock, disk = (statistics.median(column) for column in zip(*rows, strict=True))
        rate = f"{1e6 / cpu:,.0f}"
        print(f"| {name} | {length} | {reader} | {cpu:.1f} | {clock:.1f} | {rate} | {disk:.1f} |")


if __name__ == "__main__":
    main()
