"""Documents: what is read, skipped and cut, and reading from any position."""

import gzip
import json
import lzma
import random
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt_cli.core.errors import UserError
from minigpt_cli.prepare.documents import documents
from minigpt_cli.prepare.pieces import LONG_DOCUMENT, Position, find_cut
from minigpt_cli.prepare.sources import Source, detect_source, listing
from tests.helpers.documents import json_lines, read_documents


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# JSON lines


def test_json_lines_and_every_way_they_can_be_wrong(folder: Path) -> None:
    bad_lines = [
        b'{"text": "torn',
        b"[1, 2]",
        b'"text"',
        b'{"body": "x"}',
        b'{"text": 5}',
        b'{"text": null}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b"invalid_state",
        b"[" * 100_000,
    ]
    good = [{"text": "one"}, {"text": "zażółć 👍\n2", "id": 3}, {"text": ""}]
    content = b"\xef\xbb\xbf" + json_lines(good[0]).encode() + b"\n  \r\n"
    content += b"\n".join(bad_lines) + b"\n" + json_lines(*good[1:]).encode() + b'{"text": "end"}'
    file = folder / "x.jsonl"
    file.write_bytes(content)
    source = detect_source(["x.jsonl"])
    told: list[str] = []
    assert read_documents(source, on_bad=told.append) == ["one", "zażółć 👍\n2", "end"]
    assert len(told) == len(bad_lines)
    for number, message in enumerate(told, start=4):
        assert message.startswith(f"x.jsonl:{number}: "), message
    assert "fields: 'body'" in told[3]
    assert list(documents(source))[-1].after.bad == len(bad_lines)
    with pytest.raises(UserError, match=r"x\.jsonl:4: not valid JSON"):
        read_documents(source, strict=True)


def test_bad_lines_are_counted_over_files(folder: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text(json_lines("oops", {"text": name}, "oops"))
    assert [piece.after.bad for piece in documents(detect_source(["*.jsonl"]))] == [1, 3]


def test_a_json_array_is_not_json_lines(folder: Path) -> None:
    (folder / "x.json").write_text('[\n{"text": "a"},\n{"text": "b"}\n]\n')
    with pytest.raises(UserError, match="JSON array, not JSON lines"):
        read_documents(detect_source(["x.json"]))


def test_a_line_that_never_ends_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt_cli.prepare.readers.MAX_LINE", 1000)
    (folder / "x.jsonl").write_text(
        json_lines({"text": "a"}, {"text": "b" * 5000}, {"text": "c"}, {"text": "d" * 980})
    )
    told: list[str] = []
    assert read_documents(detect_source(["x.jsonl"]), on_bad=told.append) == ["a", "c", "d" * 980]
    assert len(told) == 1
    assert told[0].startswith("x.jsonl:2: longer than")


@pytest.mark.parametrize("ending", ["gz", "xz", "zst"])
def test_compressed_files(folder: Path, ending: str) -> None:
    content = json_lines(*({"text": f"document {i}"} for i in range(1000))).encode()
    (folder / "a.jsonl").write_bytes(content)
    plain = list(documents(detect_source(["a.jsonl"])))
    name = f"a.jsonl.{ending}"
    whole = compressed(content, ending)
    (folder / name).write_bytes(whole)
    source = detect_source([name])
    assert list(documents(source)) == plain
    assert list(documents(source, start=plain[600].after)) == plain[601:]
    assert listing(source)[1] is None
    (folder / f"b.TXT.{ending.upper()}").write_bytes(compressed("zażółć\n".encode() * 9, ending))
    assert read_documents(detect_source([f"b.TXT.{ending.upper()}"])) == ["zażółć\n" * 9]
    wrong = bytearray(whole)
    wrong[len(whole) // 2] ^= 255
    damaged = [whole[: len(whole) // 2], whole[:-3], b"plain text"]
    if ending != "zst":  # written here without a checksum
        damaged.append(bytes(wrong))
    for each in damaged:
        (folder / name).write_bytes(each)
        with pytest.raises(UserError, match=rf"{ending} can't be read: .* get it again") as caught:
            read_documents(source)
        assert "\n" not in str(caught.value)


def compressed(content: bytes, ending: str) -> bytes:
    if ending == "zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        return sink.getvalue().to_pybytes()
    return {"gz": gzip.compress, "xz": lzma.compress}[ending](content)


# Text


def test_text_files_are_documents_as_they_are(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n")
    (folder / "b.txt").write_bytes(b"")
    (folder / "c.txt").write_bytes("zażółć".encode())
    assert read_documents(detect_source(["*.txt"])) == ["one\r\ntwo\n\n", "zażółć"]


def test_invalid_lines_are_left_out(folder: Path) -> None:
    good = b"good line\n" * 300_000
    (folder / "a.txt").write_bytes(
        b"1 bad \xff line\nfine\r\n" + good + b"bad \xc5\n" + b"cut \xc5"
    )
    (folder / "b.txt").write_bytes(b"fine")
    source = detect_source(["*.txt"])
    told: list[str] = []
    assert read_documents(source, on_bad=told.append) == ["fine\r\n" + good.decode(), "fine"]
    assert told == [
        "a.txt:1: not valid UTF-8 at byte 6; skipped",
        "a.txt:300003: not valid UTF-8 at byte 4; skipped",
        "a.txt:300004: not valid UTF-8 at byte 4; skipped",
    ]
    whole = list(documents(source))
    assert whole[-1].after.bad == 3
    for index, piece in enumerate(whole):
        assert list(documents(source, start=piece.after)) == whole[index + 1 :]
    with pytest.raises(UserError, match=r"a\.txt:1: not valid UTF-8 at byte 6 \(refused: strict\)"):
        read_documents(source, strict=True)


@pytest.mark.parametrize("seed", range(20))
def test_exactly_the_invalid_lines_are_left_out(tmp_path: Path, seed: int) -> None:
    """Wherever the pieces of about 1 MiB end."""
    draw = random.Random(seed)
    lines = []
    while sum(map(len, lines)) < 3 * LONG_DOCUMENT:
        line = ("żółw " * draw.randrange(1, 8000)).encode()
        lines.append(line + (b"\xff\n" if draw.random() < 0.2 else b"\n"))
    (tmp_path / "a.txt").write_bytes(b"".join(lines))
    source = Source("files", (str(tmp_path / "a.txt"),))
    assert read_documents(source) == [b"".join(x for x in lines if b"\xff" not in x).decode()]
    whole = list(documents(source))
    assert whole[-1].after.bad == sum(b"\xff" in line for line in lines)
    for index, piece in enumerate(whole):
        assert list(documents(source, start=piece.after)) == whole[index + 1 :]


def test_of_a_long_line_the_invalid_pieces_are_left_out(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"first \xff" + b" word" * LONG_DOCUMENT + b"\xfd")
    told: list[str] = []
    (text,) = read_documents(detect_source(["a.txt"]), on_bad=told.append)
    assert set(text.split()) == {"word"}
    assert 3 * LONG_DOCUMENT < len(text) < 5 * LONG_DOCUMENT
    assert len(told) == 2


# Files that are no text


GZIPPED = gzip.compress(b"text" * 999, mtime=0)
LATIN = "Müller, Jürgen: Grüße\n".encode("latin-1") * 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (LATIN, r"is not UTF-8 text \(\d+\.\d% of .*\): .*`iconv -f LATIN1 -t UTF-8 a\.\w+ > NEW`"),
        ("Zażółć\n".encode("utf-16"), "holds NUL bytes.*UTF-16.*`iconv -f UTF-16 -t UTF-8"),
        ("plain text\n".encode("utf-16-le"), "holds NUL bytes.*`iconv -f UTF-16 -t UTF-8"),
        (GZIPPED, r"gzip; rename it to end with \.gz, or use `gunzip -c < a"),
        (lzma.compress(b"text" * 999), r"xz; rename it to end with \.xz, or use `xz -dc < a"),
        (b"\x7fELF\x02\x01\x01\0\0\0", "holds NUL bytes: it is a program; leave it out"),
        (b"a log with a hole\n" + b"\0" * 100, "holds NUL bytes: it looks like a binary file"),
        (b"good " * 100 + b"\xff" + b"good " * 99, "is not UTF-8 text"),  # 1 in 996
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_what_is_no_text_is_refused(folder: Path, content: bytes, message: str, name: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_documents(detect_source([name]))
    assert "\n" not in str(caught.value)


def test_less_than_one_byte_in_a_thousand_may_be_invalid(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"good " * 100 + b"\n\xff\n" + b"good " * 100)
    assert read_documents(detect_source(["a.txt"])) == ["good " * 100 + "\n" + "good " * 100]


def test_a_nul_in_a_json_string_is_text(folder: Path) -> None:
    (folder / "a.jsonl").write_text('{"text": "a\\u0000b"}\n')
    assert read_documents(detect_source(["a.jsonl"])) == ["a\0b"]


def test_a_table_with_invalid_text(folder: Path) -> None:
    texts = pa.array([b"good", b"bad \xff", b"fine"]).view(pa.binary())
    column = pa.Array.from_buffers(pa.string(), 3, texts.buffers())
    pq.write_table(pa.table({"text": column}), "a.parquet")
    told: list[str] = []
    assert read_documents(detect_source(["a.parquet"]), on_bad=told.append) == ["good", "fine"]
    assert told == ["a.parquet: row 1: field 'text' is not valid UTF-8; skipped"]


def test_an_unreadable_file_is_named(folder: Path) -> None:
    (folder / "a.txt").write_text("x")
    source = Source("files", ("a.txt", "folder.txt"))
    with pytest.raises(UserError, match=r"folder\.txt: no such file"):
        read_documents(source)
    (folder / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(UserError, match=r"loop\.txt"):
        read_documents(Source("files", ("loop.txt",)))
    reader = documents(Source("files", ("a.txt", "b.txt")))
    (folder / "b.txt").write_text("y")
    assert next(reader).data == b"x"
    (folder / "b.txt").unlink()
    with pytest.raises(UserError, match=r"b\.txt can.t be read: No such file"):
        next(reader)


def test_a_long_line_is_streamed(folder: Path) -> None:
    file = folder / "long.txt"
    with file.open("wb") as stream:
        for _ in range(20):
            stream.write(b"a" * 500_000 + "ł".encode() * 250_000)
    source = detect_source(["long.txt"])
    began = time.process_time()  # not the hour: other processes may keep the machine busy
    tracemalloc.start()
    total = 0
    for piece in documents(source):
        assert len(piece.data) <= LONG_DOCUMENT
        piece.data.decode()
        total += len(piece.data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == file.stat().st_size == 20_000_000
    assert peak < 8 * LONG_DOCUMENT
    assert time.process_time() - began < 10  # it takes one


# Where long documents are cut


@given(
    st.text(st.sampled_from("ab \n\té語👍.")), st.text(st.sampled_from(" aé")), st.integers(1, 60)
)
def test_cut_makes_progress_and_keeps_characters_whole(head: str, tail: str, limit: int) -> None:
    text = (head + tail).encode()
    if len(text) <= limit or limit < 4:
        return
    at = find_cut(text, limit)
    assert 1 <= at <= limit
    text[:at].decode()
    if " a" in text[1:limit].decode(errors="ignore") and text.rfind(b" a", 1, limit) > 0:
        assert text[at : at + 1] == b" "
        assert text[at + 1 : at + 2] not in (b" ", b"\n", b"\t")


def test_cut_prefers_a_space_before_a_word() -> None:
    assert find_cut(b"one two\n\n  three", 13) == 10
    assert find_cut(b"one two three", 8) == 7
    assert find_cut(b"one two  \n", 9) == 3  # a run of white space stays together
    assert find_cut(b"one two three", 7) == 3  # the byte after the limit isn't part of the piece
    assert find_cut("語語\n\n語語".encode(), 10) == 6
    assert find_cut("語語語語".encode(), 10) == 9
    assert find_cut(b" " * 20, 10) in range(1, 11)


def test_all_kinds_cut_a_long_document_alike(folder: Path) -> None:
    text = "".join(f"word{i} " for i in range(300_000))
    (folder / "a.txt").write_text(text)
    (folder / "a.jsonl").write_text(json_lines({"text": text}))
    pq.write_table(pa.table({"text": [text]}), folder / "a.parquet")
    cuts = [
        [(piece.data, piece.last) for piece in documents(detect_source([name]))]
        for name in ("a.txt", "a.jsonl", "a.parquet")
    ]
    assert len(cuts[0]) == 4
    assert cuts[0] == cuts[1] == cuts[2]
    assert all(data.startswith(b" word") for data, _ in cuts[0][1:])


# Tables


def test_parquet(folder: Path) -> None:
    texts = [f"text {i}" if i % 10 else None for i in range(1000)]
    pq.write_table(pa.table({"id": range(1000), "body": texts}), "t.parquet", row_group_size=300)
    source = detect_source(["t.parquet"], field="body")
    told: list[str] = []
    assert read_documents(source, on_bad=told.append) == [text for text in texts if text]
    assert told[1] == "t.parquet: row 10: no text in field 'body'; skipped"
    with pytest.raises(UserError, match=r"no field 'text'; it has id, body"):
        read_documents(detect_source(["t.parquet"]))
    with pytest.raises(UserError, match="holds int64, not text"):
        read_documents(detect_source(["t.parquet"], field="id"))
    with pytest.raises(UserError, match="row 0"):
        read_documents(source, strict=True)
    (folder / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a Parquet file"):
        read_documents(source)


def test_hugging_face_datasets_on_disk(folder: Path) -> None:
    from datasets import Dataset, DatasetDict

    texts = [f"text {i}" for i in range(700)]
    data = Dataset.from_dict({"text": texts, "label": range(700)})
    data.save_to_disk("one", num_shards=3)
    DatasetDict(train=data, test=data.select(range(5))).save_to_disk("two")
    (folder / "three").mkdir()
    data.to_parquet("three/train.parquet")
    for name in ("one", "two", "three"):
        source = Source("huggingface", (name,))
        assert read_documents(source) == texts
        reached = list(documents(source))[450].after
        assert read_documents(source, start=reached) == texts[451:]
        with pytest.raises(UserError, match=r"no field 'body'; it has text, label"):
            read_documents(Source("huggingface", (name,), field="body"))
    assert detect_source(["one"]).kind == detect_source(["two"]).kind == "huggingface"
    assert read_documents(Source("huggingface", ("two",), split="test")) == texts[:5]
    with pytest.raises(UserError, match=r"no split 'validation'; it has train, test"):
        read_documents(Source("huggingface", ("two",), split="validation"))
    with pytest.raises(UserError, match="split invalid_state"):
        read_documents(Source("huggingface", ("three",), split="invalid_state"))
    deep = "[" * 100_000
    for content in ("{", "[]", "{}", '{"splits": 3}', '{"splits": [["train"]]}', deep):
        (folder / "two/dataset_dict.json").write_text(content)
        with pytest.raises(UserError, match="two is not a saved dataset that can be read"):
            read_documents(Source("huggingface", ("two",)))
    (folder / "two/dataset_dict.json").write_text('{"splits": ["../one"]}')
    with pytest.raises(UserError, match="two is not a saved dataset that can be read"):
        read_documents(Source("huggingface", ("two",), split="../one"))
    for files in (3, [3], [{}], [{"filename": 3}], [{"filename": "../one/x.arrow"}], deep):
        content = files if isinstance(files, str) else json.dumps({"_data_files": files})
        (folder / "two/train/state.json").write_text(content)
        (folder / "two/dataset_dict.json").write_text('{"splits": ["train"]}')
        with pytest.raises(UserError, match="train is not a saved dataset that can be") as caught:
            read_documents(Source("huggingface", ("two",)))
        assert "\n" not in str(caught.value)
    next((folder / "one").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="one is not a saved dataset that can be read"):
        read_documents(Source("huggingface", ("one",)))


# Going on from a position


def sources(folder: Path) -> Iterator[Source]:
    long = "".join(f"word{i} " for i in range(300_000))
    for index in range(3):
        records = [f"r{index}{i}" * (i % 7) for i in range(400)]
        records[200:200] = [long]
        (folder / f"{index}.txt").write_bytes(long.encode() + b"\xff" + b" x" * index)
        body = json_lines(*({"text": text} for text in records), "bad", "bad")
        (folder / f"{index}.jsonl").write_text(body)
        pq.write_table(pa.table({"text": records}), f"{index}.parquet", row_group_size=150)
    for ending in ("txt", "jsonl", "parquet"):
        yield detect_source([f"*.{ending}"])


def test_reading_goes_on_from_any_position(folder: Path) -> None:
    for source in sources(folder):
        whole = list(documents(source))
        assert sum(not piece.last for piece in whole) >= 6  # positions inside of documents too
        steps = [i for i, piece in enumerate(whole) if not piece.last or i % 97 == 0]
        for index in steps:
            plain = json.loads(json.dumps(whole[index].after))
            assert list(documents(source, start=Position(*plain))) == whole[index + 1 :]


def test_positions_of_the_current_document(folder: Path) -> None:
    for source in sources(folder):
        inside = 0
        for piece in documents(source):
            inside = 0 if piece.last else inside + len(piece.data)
            assert piece.after.inside == inside


def test_no_piece_is_empty_or_too_long(folder: Path) -> None:
    for source in sources(folder):
        assert all(0 < len(piece.data) <= LONG_DOCUMENT + 2 for piece in documents(source))
