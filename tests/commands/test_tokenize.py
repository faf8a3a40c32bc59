import contextlib
import json
import os
import pty
import subprocess
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.helpers.commands import finished, refused
from tests.helpers.processes import ROOT, command, environment, minigpt

RECORDS = [("2 + 2 = ", "4"), ("The capital of France is ", "Paris"), ("Say hi: ", "hi there")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token dataset of the licence, with its tokenizer."""
    out = tmp_path_factory.mktemp("data") / "licence"
    finished("tokenize", ROOT / "LICENSE", "-o", out, "--vocab-size", 300)
    return out


def test_shard_tokens_and_old_name_of_vocab_size(trained: Path, tmp_path: Path):
    told = json.loads(
        finished("tokenize", ROOT / "LICENSE", "--out", tmp_path / "d", "--train-vocab", 300,
                 "--shard-tokens", 1000, "--json")
    )  # fmt: skip
    assert told["vocab_size"] == 300
    tokens = told["splits"]["train"]["tokens"]
    assert len(list((tmp_path / "d").glob("train-*.npy"))) == -(-tokens // 1000) > 1
    assert (tmp_path / "d/tokenizer.json").read_text() == (trained / "tokenizer.json").read_text()


def test_instructions(trained: Path, tmp_path: Path):
    file, out = tmp_path / "records.jsonl", tmp_path / "out"
    lines = [json.dumps({"prompt": a, "completion": b}) for a, b in RECORDS]
    file.write_text("\n".join(lines))
    arguments = ("tokenize", file, "-o", out, "--format", "instructions", "--tokenizer", trained,
                 "--val-fraction", 0)  # fmt: skip
    told = json.loads(finished(*arguments, "--json"))
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    counts = [len(tokenizer.encode(answer).ids) + 1 for _, answer in RECORDS]  # and end of text
    assert told["splits"]["train"]["documents"] == 3
    assert told["splits"]["train"]["loss_tokens"] == sum(counts)
    assert finished("verify", out).endswith("valid (1 checked)\n")
    assert json.loads(finished(*arguments, "--json")) == told  # it is there already


def test_chat_template(trained: Path, tmp_path: Path):
    file, template = tmp_path / "chats.jsonl", tmp_path / "t.jinja"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    file.write_text(json.dumps({"messages": messages}))
    template.write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    arguments = ("tokenize", file, "--format", "instructions", "--tokenizer", trained,
                 "--val-fraction", 0, "--json")  # fmt: skip
    tokenizer = Tokenizer.from_file(str(trained / "tokenizer.json"))
    for name, text in (
        ("chatml", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"),
        (str(template), "user: Hi\nassistant: Hello\n"),
    ):
        out = tmp_path / Path(name).name.replace(".", "-")
        told = json.loads(finished(*arguments, "-o", out, "--chat-template", name))
        assert told["splits"]["train"]["tokens"] == len(tokenizer.encode(text).ids)
    refused(2, "chat_template nowhere: no such file", *arguments, "-o", tmp_path / "x",
            "--chat-template", "nowhere")  # fmt: skip


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        ("give either --tokenizer PATH, or --vocab-size N", ()),
        ("give either --tokenizer PATH, or --vocab-size N",
         ("--vocab-size", 300, "--tokenizer", "x")),
        ("instructions need a tokenizer: give its file or directory",
         ("--format", "instructions")),
        ("--train-vocab is the old name of --vocab-size",
         ("--vocab-size", 300, "--train-vocab", 301)),
        ("--chat-template: only allowed with --format instructions",
         ("--vocab-size", 300, "--chat-template", "chatml")),
        ("--workers: not allowed with --format instructions",
         ("--tokenizer", "x", "--format", "instructions", "--strict", "--workers", 1)),
        ("--split and --config are for Hugging Face", ("--vocab-size", 300, "--split", "test")),
        ("--split and --config are for Hugging Face", ("--vocab-size", 300, "--config", "x")),
    ],
)  # fmt: skip
def test_bad_options(tmp_path: Path, part: str, arguments: tuple[object, ...]):
    (tmp_path / "a.txt").write_text("text")
    refused(2, part, "tokenize", "a.txt", "-o", "d", *arguments, cwd=tmp_path)


def test_working_directory_is_not_imported(tmp_path: Path):
    """A corpus may hold a file of a module's name; the encoding workers must not run it."""
    (tmp_path / "tokenizers.py").write_text("raise RuntimeError('the wrong module')")
    (tmp_path / "a.txt").write_text("some text " * 100)
    finished("tokenize", "a.txt", "-o", "d", "--vocab-size", 300, cwd=tmp_path)
    assert (tmp_path / "d/dataset.json").exists()


def test_bad_sources(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("")
    options = ("-o", "out", "--vocab-size", 300)
    refused(2, "nowhere.txt", "tokenize", "nowhere.txt", *options, cwd=tmp_path)
    refused(2, "no text found in empty.txt", "tokenize", "empty.txt", *options, cwd=tmp_path)


def test_what_the_end_says(tmp_path: Path):
    """Numbers and nouns agree; the share of validation; a vocabulary that is smaller."""
    (tmp_path / "a.txt").write_text("some words and more " * 99 + "\nbad \n")
    (tmp_path / "a.txt").write_bytes((tmp_path / "a.txt").read_bytes() + b"\xff\n")
    done = minigpt("tokenize", "a.txt", "-o", "d", "--vocab-size", 400, "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    lines = done.stderr.splitlines()
    size = told["splits"]["train"]["bytes"] + told["splits"]["val"]["bytes"]
    assert size == 99 * 20 + 6
    assert told["val_share"] == told["splits"]["val"]["bytes"] / size
    assert 0.045 < told["val_share"] < 0.055
    assert told["vocab_size"] < told["requested_vocab_size"] == 400
    assert lines[0] == "warning: a.txt:3: not valid UTF-8 at byte 0; skipped"
    assert lines[1].startswith("d train: 1 document, 1,8")
    assert f"d: validation is {told['val_share']:.2%} of the text (5.00% was asked for)" in lines
    assert lines[-2] == (
        f"warning: d: the vocabulary has {told['vocab_size']} entries instead of 400: the text has "
        "no more to merge"
    )
    assert lines[-1] == "warning: d: 1 malformed line was skipped"
    told = json.loads(
        finished("tokenize", "a.txt", "-o", "e", "--tokenizer", "d", "--json", cwd=tmp_path)
    )
    assert told["requested_vocab_size"] is None


def test_first_skipped_text_is_named(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"body": 1}\n{"text": 2}\n')
    refused(2, "everything was skipped, first a.jsonl:1: no field 'text'", "tokenize", "a.jsonl",
            "-o", "out", "--vocab-size", 300, cwd=tmp_path)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_pipes_do_not_hang(tmp_path: Path):
    os.mkfifo(tmp_path / "p.txt")
    options = ("-o", "out", "--vocab-size", 300)
    for source in ("p.txt", "-", "/dev/zero"):
        refused(2, "write it to a file first", "tokenize", source, *options, cwd=tmp_path)


def test_bar_with_the_time_left_on_a_terminal(tmp_path: Path):
    (tmp_path / "a.txt").write_text("some words " * 300_000)
    arguments = command("tokenize", "a.txt", "-o", "d", "--vocab-size", 300, "--workers", 1)
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        arguments, cwd=tmp_path, env=environment() | {"TERM": "xterm"}, stderr=terminal
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the other side was closed
        while chunk := os.read(main, 1 << 16):
            shown += chunk
    os.close(main)
    assert process.wait() == 0
    for part in ("tokenizing", "%", "1 document", "MB/s", "0:00:0"):
        assert part.encode() in shown
    assert b"validation is" in shown
