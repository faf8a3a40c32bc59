"""Sources: which files a user's words mean."""

import os
from pathlib import Path

import pytest

from minigpt_cli.core.errors import UserError
from minigpt_cli.prepare.sources import Source, detect_source, listing, source_files
from tests.helpers.documents import read_documents


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


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
    assert read_documents(detect_source(["**/*.txt"])) == ["a.txt", "b.txt", "deep/c.txt"]
    assert read_documents(detect_source(["b.txt", "*.txt", "deep"])) == [
        "b.txt",
        "a.txt",
        "deep/c.txt",
    ]


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
        (["-"], "standard input .* write it to a file first"),
        (["pipe"], "pipe is a pipe or a device"),
        (["/dev/null"], "/dev/null is a pipe or a device"),
        (["python-stdlib", "a.txt"], "python-stdlib can't be mixed"),
    ],
)
def test_what_is_refused(folder: Path, arguments: list[str], message: str) -> None:
    (folder / "here").mkdir()
    (folder / "mixed").mkdir()
    os.mkfifo(folder / "pipe")
    for name in ("a.txt", "b.jsonl", "mixed/a.jsonl", "mixed/b.parquet"):
        (folder / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        detect_source(arguments)


def test_a_directory_gives_the_kind_that_is_asked_for(folder: Path) -> None:
    (folder / "both").mkdir()
    (folder / "both" / "README.md").write_text("about")
    (folder / "both" / "a.jsonl").write_text('{"text": "data"}')
    assert detect_source(["both"]).kind == "jsonl"
    assert read_documents(Source("jsonl", ("both",))) == ["data"]
    assert read_documents(Source("files", ("both",))) == ["about"]
    with pytest.raises(UserError, match="no Parquet files in both"):
        read_documents(Source("parquet", ("both",)))


def test_what_a_directory_leaves_out_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "c").mkdir()
    (folder / "c/x.json").write_text("{}")
    assert detect_source(["c"]).kind == "jsonl"
    assert capsys.readouterr().err == ""
    (folder / "c/b.txt").write_text("text")
    (folder / "c/a.rst").write_text("text")
    assert detect_source(["c/"]).kind == "jsonl"
    assert capsys.readouterr().err == (
        "warning: c/: reading 1 file of JSON lines and leaving out 2 files of text (a.rst); to "
        "read text give a pattern such as 'c/**/*.rst'\n"
    )


def test_a_source_is_checked_when_it_is_made() -> None:
    for kind, path in (
        ("csv", ("a",)),
        ("files", ()),
        ("files", ("",)),
        ("huggingface", ("a/b", "c/d")),
    ):
        with pytest.raises(UserError):
            Source(kind, path)


def test_listing_has_names_and_sizes(folder: Path) -> None:
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
    texts = read_documents(source)
    assert abs(len(texts) - len(files)) < 20  # empty files are no documents
    assert sum(map(len, texts)) > 5_000_000
