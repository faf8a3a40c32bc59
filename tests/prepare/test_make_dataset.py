"""Datasets of text and of instructions, made by one function; which chat template is used."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from minigpt_cli.core.errors import UserError
from minigpt_cli.data.dataset import open_dataset
from minigpt_cli.prepare.bpe import train_bpe
from minigpt_cli.prepare.make_dataset import make_dataset, summary
from minigpt_cli.prepare.sources import Source
from tests.helpers.documents import json_lines

TALK = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
PAIR = {"prompt": "one", "completion": " two"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a tokenizer and a chat template beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    train_bpe(iter(["some text to train on"]), 280).save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ bos_token }}{% endfor %}"
    config = {"chat_template": template, "bos_token": "!"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def source_of(folder: Path, *records: Any) -> Source:
    (folder / "a.jsonl").write_text(json_lines(*records))
    return Source("jsonl", (str(folder / "a.jsonl"),))


def make(folder: Path, model: Path, out: str = "out", **options: Any) -> str:
    """Make a dataset of one conversation; return its text."""
    path = folder / out
    options = {"val_fraction": 0.0, "tokenizer_path": model} | options
    make_dataset(source_of(folder, TALK), path, format="instructions", **options)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokens, _ = open_dataset(path).splits["train"].document(0)
    return tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


def test_the_template_beside_the_tokenizer_is_used(tmp_path: Path, model: Path) -> None:
    expected = "user:a!assistant:b!"
    assert make(tmp_path, model) == expected
    assert make(tmp_path, model, "file", tokenizer_path=model / "tokenizer.json") == expected


def test_model_template_comes_first(tmp_path: Path, model: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{{ x }}{% endfor %}"
    assert make(tmp_path, model, model_template=(template, {"x": "?"})) == "a?b?"


def test_a_template_that_is_named_goes_before_all(tmp_path: Path, model: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<{{ m.content }}{{ bos_token }}>{% endfor %}")
    brought = ("{{ 1 }}", {"bos_token": "+"})
    assert make(tmp_path, model, chat_template=str(file), model_template=brought) == "<a+><b+>"
    chatml = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    assert make(tmp_path, model, "chatml", chat_template="chatml") == chatml


def test_a_template_that_can_not_be_read(tmp_path: Path, model: Path) -> None:
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    for name, reason in (
        ("nowhere", "no such file"),
        ("bytes.jinja", "can't be read: byte 0 is not"),
    ):
        with pytest.raises(UserError, match=rf"chat_template .*{name}: {reason}"):
            make(tmp_path, model, chat_template=str(tmp_path / name))


def test_summaries_have_the_same_keys(tmp_path: Path, model: Path) -> None:
    text = source_of(tmp_path, *({"text": f"text {i}"} for i in range(100, 200)), "bad")
    of_text = summary(
        make_dataset(text, tmp_path / "text", tokenizer_path=model, val_fraction=0.25),
        tmp_path / "text",
    )
    records = source_of(tmp_path, PAIR, PAIR | {"prompt": "three"}, "bad")
    of_records = summary(
        make_dataset(
            records,
            tmp_path / "records",
            format="instructions",
            tokenizer_path=model,
            val_fraction=0.5,
        ),
        tmp_path / "records",
    )
    assert of_text.keys() == of_records.keys()
    assert of_text["bad_lines"] == of_records["bad_lines"] == 1
    assert of_text["dtype"] == of_records["dtype"] == "uint16"
    assert of_text["vocab_size"] == of_records["vocab_size"]
    assert [each["documents"] for each in of_text["splits"].values()] == [75, 25]
    assert [each["documents"] for each in of_records["splits"].values()] == [1, 1]
    assert [each["bytes"] for each in of_text["splits"].values()] == [600, 200]
    assert (of_text["val_share"], of_records["val_share"]) == (0.25, 0.5)
    assert [each["bytes"] for each in of_records["splits"].values()] == [4, 4]  # " two"
    assert sum(each["tokens"] for each in of_text["splits"].values()) == sum(
        split.tokens for split in open_dataset(tmp_path / "text").splits.values()
    )
    assert json.loads(json.dumps(of_records)) == of_records


@pytest.mark.parametrize("format", ["text", "instructions"])
def test_strict_refuses_what_is_malformed(tmp_path: Path, model: Path, format: Any) -> None:
    good = {"text": "some"} if format == "text" else PAIR
    with pytest.raises(UserError, match=r"a\.jsonl:2: not valid JSON .*\(refused: strict\)"):
        make_dataset(
            source_of(tmp_path, good, "{"),
            tmp_path / "out",
            format=format,
            tokenizer_path=model,
            strict=True,
        )


def test_a_tokenizer_is_needed(tmp_path: Path, model: Path) -> None:
    for options, message in (
        ({"format": "instructions", "vocab_size": 300}, "instructions need a tokenizer"),
        ({}, "--tokenizer.*--vocab-size"),
        ({"tokenizer_path": model, "vocab_size": 300}, "--tokenizer.*--vocab-size"),
    ):
        with pytest.raises(UserError, match=message):
            make_dataset(source_of(tmp_path, PAIR), tmp_path / "out", **options)  # type: ignore[arg-type]
