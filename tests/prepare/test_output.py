"""The directory that a dataset is made in: what is refused, and what a failed start leaves."""

import os
from pathlib import Path

import pytest

from minigpt_cli.core.errors import UserError
from minigpt_cli.prepare.bpe import train_bpe
from minigpt_cli.prepare.instructions import make_instructions
from minigpt_cli.prepare.sources import Source
from minigpt_cli.prepare.tokenize import tokenize
from tests.helpers.documents import json_lines

PAIR = {"prompt": "one", "completion": " two"}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    file = tmp_path / "tokenizer.json"
    train_bpe(iter(["some text"]), 280).save(str(file))
    return file


@pytest.fixture
def good(tmp_path: Path) -> Source:
    (tmp_path / "good.txt").write_text("some text " * 100)
    return Source("files", (str(tmp_path / "good.txt"),))


@pytest.fixture
def bad(tmp_path: Path) -> Source:
    (tmp_path / "bad.txt").write_bytes(b"\0")
    return Source("files", (str(tmp_path / "bad.txt"),))


def chat(folder: Path, tokenizer: Path, *records: object) -> None:
    (folder / "a.jsonl").write_text(json_lines(*(records or [PAIR])))
    make_instructions(
        Source("jsonl", (str(folder / "a.jsonl"),)),
        folder / "new/out",
        tokenizer_path=tokenizer,
        chat_template=None,
        variables={},
        val_fraction=0.0,
        warn=lambda _: None,
    )


def test_a_failed_start_leaves_nothing(
    tmp_path: Path, bad: Source, good: Source, tokenizer: Path
) -> None:
    out = tmp_path / "new/out"
    for _ in range(2):
        with pytest.raises(UserError, match="NUL"):
            tokenize(bad, out, tokenizer_path=tokenizer)
        assert not (tmp_path / "new").exists()
        with pytest.raises(UserError, match="everything was skipped"):
            chat(tmp_path, tokenizer, "{")
        assert not (tmp_path / "new").exists()
    out.mkdir(parents=True)
    with pytest.raises(UserError, match="NUL"):
        tokenize(bad, out, tokenizer_path=tokenizer)
    assert list(out.iterdir()) == []  # the user's own directory stays
    chat(tmp_path, tokenizer)
    assert (out / "dataset.json").exists()


def test_a_lock_that_was_left_is_no_obstacle(tmp_path: Path, good: Source, tokenizer: Path) -> None:
    """Earlier versions left one after a failed start."""
    out = tmp_path / "new/out"
    for make in (lambda: chat(tmp_path, tokenizer), lambda: tokenize(good, out, train_vocab=270)):
        out.mkdir(parents=True)
        (out / ".lock").touch()
        make()
        assert (out / "dataset.json").exists()
        for file in out.iterdir():
            file.unlink()
        out.rmdir()


def test_a_directory_with_other_files_is_refused(
    tmp_path: Path, good: Source, tokenizer: Path
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    for name in ("thesis.txt", ".git", "train.npy", "config.json"):
        (out / name).write_text("x")
        with pytest.raises(UserError, match=rf"mine: holds {name}, which is not a file of a"):
            tokenize(good, out, tokenizer_path=tokenizer)
        assert os.listdir(out) == [name]
        (out / name).unlink()
    (out / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    tokenize(good, out, tokenizer_path=tokenizer)
    (out / "notes.txt").write_text("x")  # beside a dataset, which is there already
    tokenize(good, out, tokenizer_path=tokenizer)


def test_hidden_files_of_a_user_stay(tmp_path: Path, good: Source, tokenizer: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / ".notes.tmp").write_text("notes")
    with pytest.raises(UserError, match=r"holds \.notes\.tmp, which is not a file of a dataset"):
        tokenize(good, mine, tokenizer_path=tokenizer)
    assert sorted(os.listdir(mine)) == [".notes.tmp"]


@pytest.mark.parametrize("others", [(), ("thesis.txt",)])
def test_a_journal_of_somebody_else(
    tmp_path: Path, good: Source, tokenizer: Path, others: tuple[str, ...]
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("journal.json", *others):
        (mine / name).write_text('{"monday": "rain"}')
    with pytest.raises(UserError, match="choose a new") as error:
        tokenize(good, mine, tokenizer_path=tokenizer)
    assert "delete" not in str(error.value)
    assert sorted(os.listdir(mine)) == sorted(("journal.json", *others))
