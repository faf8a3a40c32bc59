"""Sources: what a user's words mean, and reading documents from any position."""

import gzip
import json
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
from minigpt_cli.prepare.sources import Source, detect_source, listing, source_files


def read(source: Source, **options: object) -> list[str]:
    """The whole documents, as text."""
    found, parts = [], []
    for piece in documents(source, **options):  # type: ignore[arg-type]
        parts.append(piece.data)
        if piece.last:
            found.append(b"".join(parts).decode())
            parts = []
    assert not parts
    return found


def lines(*records: object) -> str:
    return "".join(
        (record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# What the words mean


def test_kinds_by_ending(folder: Path) -> None:
    (folder / "deep" / "er").mkdir(parents=True)
    for name in (
        "b.txt",
        "a.txt",
        "x.jsonl",
        "x.jsonl.gz",
        "t.parquet",
        "deep/er/c.txt",
        "c.weird",
    ):
        (folder / name).write_text("")
    assert detect_source(["python-stdlib"]) == Source("python-stdlib")
    assert detect_source(["a.txt"]) == Source("files", ("a.txt",))
    assert detect_source(["c.weird"]).kind == "files"
    assert detect_source(["x.jsonl", "x.jsonl.gz"], "content").field == "content"
    assert detect_source(["x.jsonl*"]).kind == "jsonl"
    assert detect_source([str(folder / "t.parquet")]).kind == "parquet"
    assert detect_source(["deep"]) == Source("files", ("deep",))
    assert detect_source(["openai/gsm8k"]) == Source("huggingface", ("openai/gsm8k",))


def test_patterns_are_sorted_and_files_read_once(folder: Path) -> None:
    (folder / "deep").mkdir()
    for name in ("b.txt", "a.txt", "deep/c.txt", "deep/.hidden.txt"):
        (folder / name).write_text(name)
    assert read(detect_source(["**/*.txt"])) == ["a.txt", "b.txt", "deep/c.txt"]
    assert read(detect_source(["b.txt", "*.txt", "deep"])) == ["b.txt", "a.txt", "deep/c.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no source"),
        ([""], "is empty"),
        (["nowhere.txt"], r"nowhere\.txt: no such file"),
        (["here/nowhere"], "here/nowhere: no such file"),
        (["org/name.jsonl"], r"org/name\.jsonl: no such file"),
        (["/abs/path"], "/abs/path: no such file"),
        (["*.nothing"], "no file matches"),
        (["here"], "no text, JSON lines or Parquet"),
        (["a.txt", "b.jsonl"], "different kinds"),
        (["mixed"], "different kinds"),
        (["python-stdlib", "a.txt"], "python-stdlib can't be mixed"),
    ],
)
def test_what_is_refused(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "here").mkdir()
    (folder / "mixed").mkdir()
    for name in ("a.txt", "b.jsonl", "mixed/a.jsonl", "mixed/b.parquet"):
        (folder / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        detect_source(arguments)


def test_a_directory_gives_the_kind_that_is_asked_for(folder: Path) -> None:
    (folder / "both").mkdir()
    (folder / "both" / "README.md").write_text("about")
    (folder / "both" / "a.jsonl").write_text('{"text": "data"}')
    assert detect_source(["both"]).kind == "jsonl"
    assert read(Source("jsonl", ("both",))) == ["data"]
    assert read(Source("files", ("both",))) == ["about"]
    with pytest.raises(UserError, match="no Parquet files in both"):
        read(Source("parquet", ("both",)))


def test_a_source_is_checked_when_it_is_made() -> None:
    for kind, path in (
        ("csv", ("a",)),
        ("files", ()),
        ("files", ("",)),
        ("huggingface", ("a/b", "c/d")),
    ):
        with pytest.raises(UserError):
            Source(kind, path)


def test_the_listing_covers_names_and_sizes_but_not_where(folder: Path) -> None:
    for place in ("one", "two"):
        (folder / place).mkdir()
        (folder / place / "a.txt").write_text("aaaa")
        (folder / place / "b.txt").write_text("bb")
    first = listing(Source("files", ("one",)))
    assert first == listing(Source("files", (str(folder / "two"),)))
    assert first[1] == 6
    (folder / "two" / "b.txt").write_text("bbb")
    assert listing(Source("files", ("two",)))[0] != first[0]
    (folder / "two" / "b.txt").rename(folder / "two" / "c.txt")
    (folder / "two" / "c.txt").write_text("bb")
    assert listing(Source("files", ("two",)))[0] != first[0]


def test_the_standard_library() -> None:
    source = Source("python-stdlib")
    files = source_files(source)
    assert files == sorted(files)
    assert len(files) > 400
    names = {file.name for file in files}
    assert {"argparse.py", "ast.py"} <= names
    parts = {part for file in files for part in file.parts}
    assert not parts & {"test", "tests", "site-packages", "idlelib", "__pycache__"}
    texts = read(source)
    assert abs(len(texts) - len(files)) < 20  # empty files are no documents
    assert sum(map(len, texts)) > 5_000_000


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
    content = b"\xef\xbb\xbf" + lines(good[0]).encode() + b"\n  \r\n"
    content += b"\n".join(bad_lines) + b"\n" + lines(*good[1:]).encode() + b'{"text": "end"}'
    file = folder / "x.jsonl"
    file.write_bytes(content)
    source = detect_source(["x.jsonl"])
    told: list[str] = []
    assert read(source, on_bad=told.append) == ["one", "zażółć 👍\n2", "end"]
    assert len(told) == len(bad_lines)
    for number, message in enumerate(told, start=4):
        assert message.startswith(f"x.jsonl:{number}: "), message
    assert "fields: 'body'" in told[3]
    assert list(documents(source))[-1].after.bad == len(bad_lines)
    with pytest.raises(UserError, match=r"x\.jsonl:4: not valid JSON"):
        read(source, strict=True)


def test_bad_lines_are_counted_over_files(folder: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text(lines("oops", {"text": name}, "oops"))
    assert [piece.after.bad for piece in documents(detect_source(["*.jsonl"]))] == [1, 3]


def test_a_json_array_is_not_json_lines(folder: Path) -> None:
    (folder / "x.json").write_text('[\n{"text": "a"},\n{"text": "b"}\n]\n')
    with pytest.raises(UserError, match="JSON array, not JSON lines"):
        read(detect_source(["x.json"]))


def test_a_line_that_never_ends_is_skipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt_cli.prepare.readers.MAX_LINE", 1000)
    (folder / "x.jsonl").write_text(
        lines({"text": "a"}, {"text": "b" * 5000}, {"text": "c"}, {"text": "d" * 980})
    )
    told: list[str] = []
    assert read(detect_source(["x.jsonl"]), on_bad=told.append) == ["a", "c", "d" * 980]
    assert len(told) == 1
    assert told[0].startswith("x.jsonl:2: longer than")


def test_compressed_files(folder: Path) -> None:
    content = lines(*({"text": f"document {i}"} for i in range(1000)))
    (folder / "a.jsonl").write_text(content)
    with gzip.open(folder / "a.jsonl.gz", "wt") as stream:
        stream.write(content)
    with pa.output_stream("a.jsonl.zst", compression="zstd") as stream:
        stream.write(content.encode())
    plain = list(documents(detect_source(["a.jsonl"])))
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        source = detect_source([name])
        assert list(documents(source)) == plain
        assert list(documents(source, start=plain[600].after)) == plain[601:]
        assert listing(source)[1] is None
    whole = (folder / "a.jsonl.gz").read_bytes()
    (folder / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz"):
        read(detect_source(["a.jsonl.gz"]))


# Text


def test_text_files_are_documents_as_they_are(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\n")
    (folder / "b.txt").write_bytes(b"")
    (folder / "c.txt").write_bytes("zażółć".encode())
    assert read(detect_source(["*.txt"])) == ["one\r\ntwo\n\n", "zażółć"]


def test_invalid_utf8_is_replaced_and_each_file_counted_once(folder: Path) -> None:
    (folder / "a.txt").write_bytes(b"good \xff bad \xfe" + b" word" * LONG_DOCUMENT + b"\xfd")
    (folder / "b.txt").write_bytes(b"fine")
    source = detect_source(["*.txt"])
    told: list[str] = []
    first, second = read(source, on_bad=told.append)
    assert first.startswith("good \ufffd bad \ufffd word")
    assert first.endswith(" word\ufffd")
    assert second == "fine"
    assert told == ["a.txt: not valid UTF-8 at byte 5"]
    assert [piece.after.bad for piece in documents(source)] == [1] * 7
    with pytest.raises(UserError, match=r"a\.txt: not valid UTF-8 at byte 5"):
        read(source, strict=True)


def test_an_unreadable_file_is_named(folder: Path) -> None:
    (folder / "a.txt").write_text("x")
    source = Source("files", ("a.txt", "folder.txt"))
    with pytest.raises(UserError, match=r"folder\.txt: no such file"):
        read(source)
    (folder / "loop.txt").symlink_to("loop.txt")
    with pytest.raises(UserError, match=r"loop\.txt"):
        read(Source("files", ("loop.txt",)))
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
    (folder / "a.jsonl").write_text(lines({"text": text}))
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
    assert read(source, on_bad=told.append) == [text for text in texts if text]
    assert told[1] == "t.parquet: row 10: no text in field 'body'; skipped"
    with pytest.raises(UserError, match=r"no field 'text'; it has id, body"):
        read(detect_source(["t.parquet"]))
    with pytest.raises(UserError, match="holds int64, not text"):
        read(detect_source(["t.parquet"], field="id"))
    with pytest.raises(UserError, match="row 0"):
        read(source, strict=True)
    (folder / "t.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UserError, match="not a Parquet file"):
        read(source)


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
        assert read(source) == texts
        reached = list(documents(source))[450].after
        assert read(source, start=reached) == texts[451:]
        with pytest.raises(UserError, match=r"no field 'body'; it has text, label"):
            read(Source("huggingface", (name,), field="body"))
    assert detect_source(["one"]).kind == detect_source(["two"]).kind == "huggingface"
    assert read(Source("huggingface", ("two",), split="test")) == texts[:5]
    with pytest.raises(UserError, match=r"no split 'validation'; it has train, test"):
        read(Source("huggingface", ("two",), split="validation"))
    with pytest.raises(UserError, match="split invalid_state"):
        read(Source("huggingface", ("three",), split="invalid_state"))
    next((folder / "one").glob("*.arrow")).unlink()
    with pytest.raises(UserError, match="one is not a saved dataset that can be read"):
        read(Source("huggingface", ("one",)))


# Going on from a position


def sources(folder: Path) -> Iterator[Source]:
    long = "".join(f"word{i} " for i in range(300_000))
    for index in range(3):
        records = [f"r{index}{i}" * (i % 7) for i in range(400)]
        records[200:200] = [long]
        (folder / f"{index}.txt").write_bytes(long.encode() + b"\xff" + b" x" * index)
        body = lines(*({"text": text} for text in records), "bad", "bad")
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


def test_positions_hold_the_bytes_of_the_current_document(folder: Path) -> None:
    for source in sources(folder):
        inside = 0
        for piece in documents(source):
            inside = 0 if piece.last else inside + len(piece.data)
            assert piece.after.inside == inside


def test_no_piece_is_empty_or_too_long(folder: Path) -> None:
    for source in sources(folder):
        assert all(0 < len(piece.data) <= LONG_DOCUMENT + 2 for piece in documents(source))
