"""The split: within a tenth of the bytes asked for, whatever the number and sizes of documents."""

import hashlib
import json
import random
from collections import Counter, deque
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minigpt_cli.prepare.documents import documents
from minigpt_cli.prepare.pieces import LONG_DOCUMENT
from minigpt_cli.prepare.sources import Source
from minigpt_cli.prepare.split import SplitPosition, assign_splits
from minigpt_cli.prepare.split_rule import SplitRule, choose_split_rule
from tests.helpers.documents import json_lines

WORDS = ["the", "of", "and", "zażółć", "gęślą", "language", "model", "語", "training", "tokens\n"]


def text_of(size: int, seed: int) -> str:
    """Text of exactly ``size`` bytes, in words."""
    draw = random.Random(seed)
    text = ""
    while len(text) < size:
        text += " ".join(draw.choices(WORDS, k=1000)) + " "
    text = text.encode()[:size].decode(errors="ignore")
    return text + "." * (size - len(text.encode()))


def sizes_of(shape: str, count: int) -> list[int]:
    draw = random.Random(count)
    if shape == "equal":
        return [3_000_000 // count] * count
    if shape == "skewed":  # a few documents hold most of the text
        return [max(40, int(3_000_000 / (i + 1) ** 1.5)) for i in range(count)]
    if shape == "giant":
        return [2_500_000, *[max(50, 500_000 // count)] * (count - 1)]
    return [max(30, int(draw.lognormvariate(7, 1.5))) for _ in range(count)]


def split_of(source: Source, rule: SplitRule) -> tuple[list[str], list[str]]:
    """The documents of training and of validation."""
    found: tuple[list[str], list[str]] = ([], [])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for piece in assign_splits(source, rule, True, None, SplitPosition()):
        parts[piece.val].append(piece.data)
        if piece.last:
            found[piece.val].append(b"".join(parts[piece.val]).decode())
            parts[piece.val].clear()
    assert parts == ([], [])
    return found


def size(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def write(folder: Path, kind: str, texts: list[str]) -> Source:
    if kind == "files":
        for index, text in enumerate(texts):
            (folder / f"{index:04d}.txt").write_text(text)
        return Source("files", (str(folder / "*.txt"),))
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), folder / "a.parquet", row_group_size=100)
        return Source("parquet", (str(folder / "a.parquet"),))
    (folder / "a.jsonl").write_text(json_lines(*({"text": text} for text in texts)))
    return Source("jsonl", (str(folder / "a.jsonl"),))


@pytest.mark.parametrize("kind", ["files", "jsonl", "parquet"])
@pytest.mark.parametrize("shape", ["equal", "skewed", "giant", "natural"])
@pytest.mark.parametrize("count", [1, 2, 8, 100, 1000])
def test_validation_is_within_a_tenth(tmp_path: Path, kind: str, shape: str, count: int) -> None:
    texts = [text_of(each, seed) for seed, each in enumerate(sizes_of(shape, count))]
    source = write(tmp_path, kind, texts)
    for fraction in (0.005, 0.05, 0.1, 0.5):
        rule = choose_split_rule(source, True, fraction)
        train, val = split_of(source, rule)
        assert abs(size(val) / size(texts) - fraction) <= fraction / 10, (fraction, rule.name)
        assert size(train) + size(val) == size(texts) == rule.total_bytes
        largest = max(len(text.encode()) for text in texts)
        assert rule.name == ("tails" if largest > size(texts) * fraction / 10 else "bytes")
        if rule.name == "bytes":
            assert Counter(train) + Counter(val) == Counter(texts)
        else:
            check_tails(texts, train, val, fraction)


def check_tails(texts: list[str], train: list[str], val: list[str], fraction: float) -> None:
    """Each long document gives its end, near the share asked for, and before a word."""
    heads, tails = deque(train), deque(val)
    for text in texts:
        if heads and heads[0] == text:
            heads.popleft()
        elif tails[0] == text:  # a short one, where others before it gave too little
            tails.popleft()
        else:
            tail = tails.popleft()
            assert heads.popleft() + tail == text
            if len(tail) > 20:
                assert tail[0] in " \n", tail[:20]
    assert not heads
    assert not tails
    # Documents that are long enough all give something.
    assert len(val) >= sum(len(text.encode()) * fraction > 300 for text in texts)


def test_two_files_give_both_their_ends(tmp_path: Path) -> None:
    """One whole file of two was validation: 29% or 47% of the text instead of 5%."""
    texts = [text_of(700_000, 1), text_of(290_000, 2)]
    source = write(tmp_path, "files", texts)
    train, val = split_of(source, choose_split_rule(source, True, 0.05))
    assert [a + b for a, b in zip(train, val, strict=True)] == texts
    for text, tail in zip(texts, val, strict=True):
        assert len(tail.encode()) / len(text.encode()) == pytest.approx(0.05, rel=0.01)


def test_the_smallest_hashes_are_validation(tmp_path: Path) -> None:
    """Against brute force."""
    draw = random.Random(3)
    texts = [text_of(draw.randrange(100, 3000), seed) for seed in range(1000)]
    source = write(tmp_path, "jsonl", texts)
    wanted = 0.1 * size(texts)
    ranked = sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
    ends = range(len(ranked))
    best = min(ends, key=lambda end: abs(size(ranked[:end]) - wanted))
    _, val = split_of(source, choose_split_rule(source, True, 0.1))
    assert sorted(val) == sorted(ranked[:best])
    source = write(tmp_path, "jsonl", texts[::-1])  # the order makes no difference
    assert sorted(split_of(source, choose_split_rule(source, True, 0.1))[1]) == sorted(val)


@pytest.mark.parametrize("fraction", [0.005, 0.05, 0.5])
@pytest.mark.parametrize("copies", [30, 300, 2000])
def test_equal_documents_stay_together(tmp_path: Path, copies: int, fraction: float) -> None:
    texts = [text_of(500, seed) for seed in range(4000)] + [text_of(500, -1)] * copies
    source = write(tmp_path, "jsonl", texts)
    rule = choose_split_rule(source, True, fraction)
    train, val = split_of(source, rule)
    assert rule.name == "bytes"
    assert size(val) / size(texts) == pytest.approx(fraction, rel=0.1)
    assert not set(train) & set(val)


def test_all_documents_equal(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl", [text_of(500, 1)] * 1000)
    train, val = split_of(source, choose_split_rule(source, True, 0.05))
    assert size(val) / 500_000 == pytest.approx(0.05, rel=0.1)
    assert size(train) > 0


@pytest.mark.parametrize("text", ["a", "é", "語", "語語語", "ab", "one two three"])
@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.99])
def test_characters_stay_whole_and_training_has_something(
    tmp_path: Path, text: str, fraction: float
) -> None:
    for count in (1, 2, 5):
        source = write(tmp_path, "jsonl", [text] * count)
        train, val = split_of(source, choose_split_rule(source, True, fraction))
        assert train
        assert "\ufffd" not in "".join(train + val)
        assert sorted("".join(train + val)) == sorted(text * count)


@pytest.mark.parametrize("fraction", [0.9, 0.95, 0.999])
def test_something_is_left_for_training(tmp_path: Path, fraction: float) -> None:
    texts = [text_of(500, seed) for seed in range(200)]
    source = write(tmp_path, "jsonl", texts)
    train, val = split_of(source, choose_split_rule(source, True, fraction))
    assert size(train) > 0
    assert size(val) / size(texts) == pytest.approx(fraction, rel=0.1)


def test_no_validation_for_0(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl", [text_of(500, seed) for seed in range(9)])
    assert split_of(source, choose_split_rule(source, True, 0))[1] == []


def test_a_tail_that_begins_with_a_piece(tmp_path: Path) -> None:
    source = write(tmp_path, "jsonl", ["word " * (LONG_DOCUMENT // 2)])
    first, *others = documents(source)
    assert len(others) == 2
    rule = SplitRule("tail", 0.5, cut_at=len(first.data))
    found = list(assign_splits(source, rule, True, None, SplitPosition()))
    expected = [(False, True), (True, False), (True, True)]
    assert [(piece.val, piece.last) for piece in found] == expected
    assert [piece.data for piece in found] == [first.data, *(piece.data for piece in others)]


LONG = 5 * (LONG_DOCUMENT // 2) // 5 * 5


@pytest.mark.parametrize(
    "rule",
    [
        SplitRule("hash", 0.9999),
        SplitRule("hash", 0),
        SplitRule("bytes", 0.9, end=1 << 20),
        SplitRule("tail", 0.5, cut_at=LONG_DOCUMENT + 99),
        SplitRule("tails", 0.5, tolerance=999, long_sizes=(LONG, LONG, LONG), total_bytes=3 * LONG),
        SplitRule("tails", 0.1, tolerance=0, long_sizes=(LONG, LONG, LONG), total_bytes=3 * LONG),
    ],
)
def test_it_goes_on_inside_of_a_document(tmp_path: Path, rule: SplitRule) -> None:
    count = 1 if rule.name == "tail" else 3
    texts = ["word " * (LONG // 5), "some short text " * 100] * count
    source = write(tmp_path, "jsonl", texts[: 1 if count == 1 else None])
    found = list(assign_splits(source, rule, True, None, SplitPosition()))
    assert any(piece.val for piece in found) == (rule.val_fraction > 0)
    for index, piece in enumerate(found):
        if piece.after is not None:
            after = json.loads(json.dumps(piece.after))
            place = SplitPosition(type(piece.after.position)(*after[0]), *after[1:])
            assert list(assign_splits(source, rule, True, None, place)) == found[index + 1 :]


@pytest.mark.parametrize("fraction", [0.003, 0.05, 0.1, 0.2, 0.9])
def test_one_document_is_cut_where_earlier_versions_cut_it(tmp_path: Path, fraction: float) -> None:
    for length in (700, 5001, 60_000, 3_000_000):
        source = write(tmp_path, "jsonl", [text_of(length, length)])
        cut = max(1, int(length * (1 - fraction)))
        old = split_of(source, SplitRule("tail", fraction, cut_at=cut))
        if size(old[1]) == pytest.approx(length * fraction, rel=0.05):
            assert split_of(source, choose_split_rule(source, True, fraction)) == old
