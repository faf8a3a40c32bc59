"""Reading by position: few files are open, and no read costs more where there are many shards."""

import gc
import hashlib
import os
import resource
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from minigpt_cli.core.errors import Damaged
from minigpt_cli.data import shard_files
from minigpt_cli.data.dataset import TokenSplit, open_dataset
from minigpt_cli.data.dataset_manifest import Shard
from minigpt_cli.data.file_checks import shard_problem
from minigpt_cli.data.shard_files import ShardFiles
from tests.helpers.calls import system_calls
from tests.helpers.token_dataset import VOCAB, build_dataset

TOKENS = np.random.default_rng(0).integers(0, VOCAB, 4000)


@pytest.fixture
def twenty_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_files, "_MOST_OPEN", 20)


@contextmanager
def no_more_files() -> Iterator[None]:
    """No number is free for another open file."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def open_files() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def test_a_read_from_an_open_file_is_one_call(quick: Path):
    split = build_dataset(quick, TOKENS, 1000).splits["train"]
    split.gather(np.arange(30), 100)
    with system_calls() as calls:
        split.gather(np.array([3, 12, 35]), 100)
    assert calls == {"preadv": 3}


@pytest.mark.usefixtures("twenty_open")
def test_a_file_that_is_not_open_costs_the_same_with_any_number_of_shards(quick: Path):
    found = []
    for shards in (40, 400):
        split = build_dataset(quick / str(shards), TOKENS, 4000 // shards).splits["train"]
        split.slice(0, 4000)
        with system_calls() as calls:
            split.slice(0, 8)  # of the first shard, which has been dropped
        found.append(calls)
    assert found[0] == found[1] == {"open": 1, "fstat": 1, "preadv": 1, "close": 1}


@pytest.mark.usefixtures("twenty_open")
def test_few_files_are_open_and_all_are_closed(quick: Path):
    before = open_files()
    split = build_dataset(quick, TOKENS, 10).splits["train"]
    for _ in range(2):
        assert np.array_equal(split.slice(0, 4000), TOKENS)
        assert before < open_files() <= before + 20
    del split
    assert open_files() == before


def test_opening_a_dataset_asks_five_times_per_shard(quick: Path):
    found = []
    for shards in (1, 41):
        build_dataset(quick / str(shards), TOKENS, -(-4000 // shards))
        with system_calls() as calls:
            open_dataset(quick / str(shards))
        found.append(calls)
    each = dict.fromkeys(("stat", "open", "fstat", "pread", "close"), 40)
    assert found[1] - found[0] == each


@pytest.mark.parametrize("files", [8, 4000])
def test_threads_share_it(quick: Path, monkeypatch: pytest.MonkeyPatch, files: int):
    monkeypatch.setattr(shard_files, "_MOST_OPEN", files)
    split = build_dataset(quick, TOKENS, 20).splits["train"]  # 200 files, a fourth of ulimit -n

    def read(seed: int) -> int:
        random = np.random.default_rng(seed)
        for start in random.integers(0, 3960, 2000).tolist():
            assert np.array_equal(split.slice(start, start + 35), TOKENS[start : start + 35])
        return seed

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, range(4))) == [0, 1, 2, 3]


def test_a_header_of_another_length(tmp_path: Path):
    """Other tools may pad it otherwise; ours has 128 bytes."""
    array = np.arange(100, dtype=np.uint16)
    np.save(tmp_path / "x.npy", array)
    content = (tmp_path / "x.npy").read_bytes()
    header = content[10:128].rstrip(b"\n") + b" " * 64 + b"\n"
    whole = content[:8] + len(header).to_bytes(2, "little") + header + content[128:]
    for changed, problem in (
        (whole, None),
        (whole + b"\0\0", "its header is not that of a shard"),
        (whole[:9] + b"\xff" + whole[10:], "its header is not that of a shard"),
    ):
        (tmp_path / "x.npy").write_bytes(changed)
        shard = Shard("x.npy", 100, len(changed), "")
        assert shard_problem(tmp_path / "x.npy", shard, "uint16") == problem
    (tmp_path / "x.npy").write_bytes(whole)
    shard = Shard("x.npy", 100, len(whole), hashlib.sha256(whole).hexdigest())
    assert np.array_equal(np.load(tmp_path / "x.npy"), array)
    files = ShardFiles(tmp_path, (shard,), "uint16", {})
    out = np.empty(50, dtype=np.uint16)
    files.read(0, 50, out)
    assert np.array_equal(out, array[50:])


# Files that change under an open dataset


@pytest.fixture
def split(quick: Path) -> TokenSplit:
    return build_dataset(quick, TOKENS, 1000).splits["train"]


def replace_file(file: Path, content: bytes, seconds: float = 5) -> None:
    """As a copying tool does: the new file has another time."""
    new = file.with_name("new")
    new.write_bytes(content)
    os.utime(new, (file.stat().st_mtime + seconds,) * 2)
    new.replace(file)


def test_another_file_of_the_same_content_is_read(split: TokenSplit):
    file = split.directory / "train-00001.npy"
    replace_file(file, file.read_bytes())
    assert np.array_equal(split.slice(900, 2100), TOKENS[900:2100])


@pytest.mark.parametrize("change", ["flip", "shorter", "longer", "pipe"])
def test_a_file_that_changed_before_the_first_read_is_damage(split: TokenSplit, change: str):
    file = split.directory / "train-00001.npy"
    content = file.read_bytes()
    if change == "pipe":
        file.unlink()
        os.mkfifo(file)
    else:
        other = {
            "flip": content[:-1] + bytes([content[-1] ^ 1]),
            "shorter": content[:-2],
            "longer": content + b"\0\0",
        }
        replace_file(file, other[change])
    assert np.array_equal(split.slice(0, 1000), TOKENS[:1000])
    with pytest.raises(
        Damaged, match=r"train-00001\.npy: was changed since it was checked"
    ) as error:
        split.slice(900, 2100)
    assert error.value.exit_code == 4


def test_an_open_file_that_gets_shorter_is_damage(split: TokenSplit):
    file = split.directory / "train-00002.npy"
    split.slice(2000, 2010)
    os.truncate(file, 128 + 2 * 500)
    assert np.array_equal(split.slice(2000, 2500), TOKENS[2000:2500])
    with pytest.raises(Damaged, match=r"train-00002\.npy: ends at byte 1,128"):
        split.slice(2000, 2501)


def test_a_missing_file_is_damage(split: TokenSplit):
    (split.directory / "train-00002.npy").unlink()
    with pytest.raises(Damaged, match=r"00002\.npy: can't be read at byte 148 \(No such file"):
        split.slice(2010, 2020)


def test_too_many_open_files_is_no_damage(split: TokenSplit):
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        split.slice(0, 10)
    assert np.array_equal(split.slice(0, 10), TOKENS[:10])


@pytest.mark.usefixtures("twenty_open")
def test_a_file_that_is_replaced_by_turns_is_never_misread(quick: Path):
    """Each value of a sequence comes from the file that was checked, or there is an error."""
    split = build_dataset(quick, TOKENS, 10).splits["train"]
    file = quick / "train-00100.npy"
    content = file.read_bytes()
    expected = TOKENS[1000:1010]
    outcomes = set()
    for turn in range(12):
        replace_file(file, content if turn % 2 else content[:-2] + b"\1\1", turn)
        split.slice(0, 1000)  # drops the file
        try:
            outcomes.add(np.array_equal(split.slice(1000, 1010), expected))
        except Damaged:
            outcomes.add("damaged")
    assert outcomes == {True, "damaged"}
