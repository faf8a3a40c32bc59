"""Datasets: sequences over many shards equal slices of one array; damage is found and named."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.core.files import json_checksum
from minigpt_cli.data.dataset import open_dataset, verify_dataset
from minigpt_cli.data.tokenizer import tokenizer_fingerprint
from minigpt_cli.prepare.bpe import train_bpe
from minigpt_cli.prepare.writer import ShardWriter, npy_header
from tests.helpers.token_dataset import VOCAB, build_dataset


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_bpe(iter(["some text, some words " * 30]), 280)


@pytest.fixture
def dataset(quick: Path, tokenizer: Any) -> Path:
    build_dataset(quick / "data", np.arange(1000) % VOCAB, 300, tokenizer)
    return quick / "data"


# Reading


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    count=st.integers(0, 200),
    shard_tokens=st.integers(1, 90),
    length=st.integers(1, 70),
    dtype=st.sampled_from(["uint16", "uint32"]),
    data=st.data(),
)
def test_sequences_and_slices_equal_those_of_one_array(
    quick: Path,
    tokenizer: Any,
    count: int,
    shard_tokens: int,
    length: int,
    dtype: str,
    data: st.DataObject,
) -> None:
    tokens = np.random.default_rng(count).integers(0, VOCAB, count)
    path = quick / "dataset"
    shutil.rmtree(path, ignore_errors=True)
    split = build_dataset(path, tokens, shard_tokens, tokenizer, dtype).splits["train"]
    assert split.tokens == count
    assert split.num_sequences(length) == max(0, (count - 1) // length)
    assert len(list(path.glob("train-*.npy"))) == -(-count // shard_tokens)
    assert not list(path.glob("*.partial"))
    ids = np.array(
        data.draw(st.lists(st.integers(0, split.num_sequences(length) - 1), max_size=9))
        if split.num_sequences(length)
        else [],
        dtype=np.int64,
    )
    sequences = split.gather(ids, length)
    assert sequences.dtype == np.int64
    assert sequences.shape == (len(ids), length + 1)
    for sequence, start in zip(sequences, ids * length, strict=True):
        assert np.array_equal(sequence, tokens[start : start + length + 1])
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    assert np.array_equal(split.slice(start, stop), tokens[start:stop])
    if start < count:
        file, offset = split.locate(start)
        assert np.load(path / file, mmap_mode="r")[offset] == tokens[start]


def test_neighbouring_sequences_share_one_token(dataset: Path) -> None:
    split = open_dataset(dataset).splits["train"]
    sequences = split.gather(np.arange(split.num_sequences(100)), 100)
    assert len(sequences) == 9  # the last 99 tokens don't fill a tenth
    assert np.array_equal(sequences[1:, 0], sequences[:-1, -1])


def test_outside_of_the_data_is_rejected(dataset: Path) -> None:
    split = open_dataset(dataset).splits["train"]
    for ids in ([9], [-1], [0, 9]):
        with pytest.raises(AssertionError):
            split.gather(np.array(ids), 100)
    for start, stop in ((-1, 5), (5, 4), (990, 1001)):
        with pytest.raises(AssertionError):
            split.slice(start, stop)
    for offset in (-1, 1000):
        with pytest.raises(AssertionError):
            split.locate(offset)
    with pytest.raises(AssertionError):
        split.num_sequences(0)
    assert open_dataset(dataset).splits["val"].num_sequences(8) == 0


def test_a_token_outside_of_the_vocabulary_is_located(dataset: Path) -> None:
    file = dataset / "train-00001.npy"
    shard = np.load(file, mmap_mode="r+")
    shard[50] = VOCAB
    shard.flush()
    split = open_dataset(dataset).splits["train"]
    assert split.gather(np.array([0, 1, 2]), 100).max() < VOCAB
    with pytest.raises(Damaged, match=r"train-00001\.npy: token 300 at offset 50 is outside"):
        split.gather(np.array([1, 3]), 100)
    with pytest.raises(Damaged, match="offset 50"):
        split.slice(340, 360)


def test_more_shards_than_file_descriptors(quick: Path, tokenizer: Any) -> None:
    import resource

    tokens = np.arange(1200) % VOCAB
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    split = build_dataset(quick, tokens, 2, tokenizer).splits["train"]
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, limits[1]))
    try:
        assert np.array_equal(split.slice(0, 1200), tokens)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_shards_are_plain_npy(dataset: Path) -> None:
    shard = np.load(dataset / "train-00000.npy", mmap_mode="r")
    assert shard.dtype == np.uint16
    assert shard.shape == (300,)
    assert len(np.load(dataset / "train-00003.npy")) == 100
    for length in (0, 1, 10**15):
        assert len(npy_header(np.dtype("uint32"), length)) == 128


# Writing


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    cuts=st.lists(st.tuples(st.integers(0, 100), st.integers(0, 60), st.booleans()), max_size=8),
    shard_tokens=st.integers(1, 60),
)
def test_a_writer_taken_up_again_writes_the_same_bytes(
    quick: Path, cuts: list[tuple[int, int, bool]], shard_tokens: int
) -> None:
    tokens = np.arange(100, dtype=np.uint16)
    straight, broken = quick / "straight", quick / "broken"
    for path in (straight, broken):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    writer = ShardWriter(straight, "train", "uint16", shard_tokens)
    writer.write(tokens)
    expected = writer.finish()
    writer = ShardWriter(broken, "train", "uint16", shard_tokens)
    done = 0
    for cut, further, ends in sorted(cuts):
        writer.write(tokens[done:cut])
        writer.sync()
        finished, pending, done = tuple(writer.finished), writer.pending, cut
        writer.write(np.full(further, 999, dtype=np.uint16))  # after the last sync: to be cut off
        if ends:
            writer.finish()
        writer.close()
        writer = ShardWriter(broken, "train", "uint16", shard_tokens, finished, pending)
        assert sum(shard.tokens for shard in writer.finished) + writer.pending == done
    writer.write(tokens[done:])
    assert writer.finish() == expected
    for shard in expected:
        assert (broken / shard.file).read_bytes() == (straight / shard.file).read_bytes()


def test_a_lost_partial_shard_is_damage(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train", "uint16", 100)
    writer.write(np.arange(50, dtype=np.uint16))
    writer.close()
    os.truncate(tmp_path / "train-00000.npy.partial", 150)
    with pytest.raises(Damaged, match="should hold 50 tokens"):
        ShardWriter(tmp_path, "train", "uint16", 100, (), 50)


# Damage


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def other_dtype(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(npy_header(np.dtype("int16"), 300) + content[128:])


def other_length(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(npy_header(np.dtype("uint16"), 299) + content[128:])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (Path.unlink, "is missing"),
        (lambda file: os.truncate(file, 400), "is 400 bytes instead of 728"),
        (lambda file: file.write_bytes(b"\0" * 728), "header is not that of a shard"),
        (other_dtype, "header doesn't say 300 entries of uint16"),
        (other_length, "header doesn't say 300 entries of uint16"),
    ],
)
def test_damage_is_found_on_opening(dataset: Path, harm: Any, message: str) -> None:
    open_dataset(dataset, verify=True)
    assert list(verify_dataset(dataset)) == []
    harm(dataset / "train-00002.npy")
    with pytest.raises(Damaged, match=rf"train-00002\.npy: (its )?{message}") as caught:
        open_dataset(dataset)
    assert "make it again" in str(caught.value)
    assert caught.value.exit_code == 4
    assert list(verify_dataset(dataset)) == ["train-00002.npy"]


def test_a_flipped_bit_is_found_by_verifying(dataset: Path) -> None:
    for name in ("train-00000.npy", "train-00003.npy"):
        flip_last_byte(dataset / name)
    open_dataset(dataset)
    with pytest.raises(Damaged, match=r"train-00000\.npy: its content doesn't match its sha256"):
        open_dataset(dataset, verify=True)
    assert list(verify_dataset(dataset)) == ["train-00000.npy", "train-00003.npy"]


def test_a_changed_manifest_is_damage(dataset: Path) -> None:
    file = dataset / "dataset.json"
    whole = file.read_text()
    changed = json.loads(whole)
    changed["vocab_size"] = 301
    for content in (json.dumps(changed), whole[:-50], "[]", "{}", "", "null", '{"format": 1}'):
        file.write_text(content)
        with pytest.raises(Damaged, match=r"dataset\.json"):
            open_dataset(dataset)
        assert list(verify_dataset(dataset)) == ["dataset.json"]
    file.write_text(json.dumps(json.loads(whole), indent=4))  # the same content in another layout
    open_dataset(dataset)
    file.write_text(json.dumps(json.loads(whole) | {"format": 3}))
    with pytest.raises(UserError, match="format 3, newer than the 2"):
        open_dataset(dataset)


SHARD = {"file": "x.npy", "tokens": 1, "bytes_on_disk": 130, "sha256": ""}
WRONG = [
    ("splits", []),
    ("splits.train", None),
    ("splits.train.shards", {}),
    ("splits.train.shards", [[]]),
    ("splits.train.shards", [SHARD | {"tokens": "1"}]),
    ("splits.train.shards", [SHARD | {"tokens": -1}]),
    ("splits.train.shards", [SHARD]),  # not as many tokens as the split
    *(("splits.train.shards.0.file", name) for name in ("../../x", "/etc/passwd", "..", "", "a/b")),
    ("splits.train.loss_mask", SHARD | {"file": "../x"}),
    ("splits.train.tokens", True),
    ("splits.train.documents", 1.5),
    ("eos_id", "0"),
    ("dtype", "float64"),
    ("dtype", 16),
    ("vocab_size", None),
    ("vocab_size", 10**30),
    ("tokenizer_fingerprint", 5),
    ("source", []),
    ("settings", "x"),
    ("bad_lines", -1),
    ("unknown", 1),
    ("format", "1"),
    ("format", [1]),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_manifest_of_wrong_types_is_damage(dataset: Path, name: str, value: Any) -> None:
    """Also if its checksum is right, as in a dataset that someone else made."""
    file = dataset / "dataset.json"
    record = json.loads(file.read_text())
    del record["checksum"]
    *parents, last = (int(key) if key.isdecimal() else key for key in name.split("."))
    place = record
    for key in parents:
        place = place[key]
    place[last] = value
    file.write_text(json.dumps(record | {"checksum": json_checksum(record)}))
    with pytest.raises(Damaged, match=r"dataset\.json: .*(restore|again)") as caught:
        open_dataset(dataset)
    assert "\n" not in str(caught.value)
    assert list(verify_dataset(dataset)) == ["dataset.json"]


@pytest.mark.parametrize("name", ["dataset.json", "instructions.json"])
def test_deep_json_is_damage(dataset: Path, name: str) -> None:
    (dataset / "dataset.json").rename(dataset / name)
    for content in (b"[" * 100_000, b'{"a": ' + b"[" * 500 + b"]" * 500 + b"}", b"\xff", b"3"):
        (dataset / name).write_bytes(content)
        with pytest.raises(Damaged, match=name) as caught:
            open_dataset(dataset)
        assert "\n" not in str(caught.value)
    (dataset / name).unlink()
    os.mkfifo(dataset / name)
    with pytest.raises(UserError, match=f"{name}: is not a regular file"):
        open_dataset(dataset)


@pytest.mark.parametrize("name", ["train-00000.npy", "tokenizer.json"])
def test_a_pipe_in_a_dataset_is_damage(dataset: Path, name: str) -> None:
    (dataset / name).unlink()
    os.mkfifo(dataset / name)
    with pytest.raises(Damaged, match=rf"{name}: is not a regular file"):
        open_dataset(dataset)
    assert verify_dataset(dataset)[name] == "is not a regular file"


def test_a_writer_follows_no_links(quick: Path) -> None:
    (quick / "precious").write_text("x")
    (quick / "train-00000.npy.partial").symlink_to(quick / "precious")
    writer = ShardWriter(quick, "train", "uint16", 10)
    writer.write(np.arange(20, dtype=np.uint16))
    writer.finish()
    assert (quick / "precious").read_text() == "x"
    assert len(np.load(quick / "train-00000.npy")) == 10


def test_another_tokenizer_is_found(dataset: Path, tokenizer: Any) -> None:
    open_dataset(dataset, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer))
    with pytest.raises(UserError, match="made with another tokenizer") as caught:
        open_dataset(dataset, tokenizer_fingerprint="0" * 64)
    assert caught.value.exit_code == 2
    file = dataset / "tokenizer.json"
    file.write_text(tokenizer.to_str(pretty=True))  # the same one
    open_dataset(dataset)
    file.write_text(train_bpe(iter(["other words"]), 270).to_str())
    with pytest.raises(Damaged, match=r"tokenizer\.json"):
        open_dataset(dataset)
    file.unlink()
    with pytest.raises(Damaged, match=r"tokenizer\.json"):
        open_dataset(dataset)
    assert list(verify_dataset(dataset)) == ["tokenizer.json"]


def test_what_is_no_dataset(tmp_path: Path, dataset: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    (tmp_path / "journal.json").write_text("{}")
    for path, message in (
        (tmp_path / "missing", "no such directory"),
        (tmp_path, "unfinished"),
        (file, "there is no dataset.json"),
    ):
        for opened in (open_dataset, verify_dataset):
            with pytest.raises(UserError, match=f"is not a token dataset.*{message}") as caught:
                opened(path)
            assert caught.value.exit_code == 2


def test_the_fingerprint_covers_every_token(quick: Path, tokenizer: Any) -> None:
    tokens = np.arange(500) % VOCAB
    first = build_dataset(quick / "a", tokens, 100, tokenizer).manifest.fingerprint
    assert build_dataset(quick / "b", tokens, 100, tokenizer).manifest.fingerprint == first
    tokens[-1] += 1
    assert build_dataset(quick / "c", tokens, 100, tokenizer).manifest.fingerprint != first
