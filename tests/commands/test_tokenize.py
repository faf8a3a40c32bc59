import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.helpers.commands import finished, refused
from tests.helpers.processes import ROOT

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
    refused(2, "chat_template nowhere can't be read", *arguments, "-o", tmp_path / "x",
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
