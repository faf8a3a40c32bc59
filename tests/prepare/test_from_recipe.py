"""A recipe's dataset: made once, used as it is where its text is missing."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from minigpt_cli.core.errors import UserError
from minigpt_cli.data.dataset import open_dataset
from minigpt_cli.prepare.bpe import train_bpe
from minigpt_cli.prepare.from_recipe import prepare_data
from minigpt_cli.recipe import parse_recipe
from tests.helpers.documents import json_lines
from tests.helpers.processes import ROOT
from tests.helpers.recipes import TINY


def prepare(folder: Path, *overrides: str) -> None:
    text = TINY.format(data=folder / "data")
    source = ["data.source.kind=files", f"data.source.path=['{folder}/*.txt']"]
    prepare_data(parse_recipe(text, [*source, "data.tokenizer.train_vocab=300", *overrides]))


def test_dataset_is_made_once(tmp_path: Path):
    (tmp_path / "a.txt").write_text((ROOT / "LICENSE").read_text())
    prepare(tmp_path)
    manifest = (tmp_path / "data/dataset.json").read_bytes()
    prepare(tmp_path)
    assert (tmp_path / "data/dataset.json").read_bytes() == manifest
    with pytest.raises(UserError, match="other settings"):
        prepare(tmp_path, "data.tokenizer.train_vocab=310")
    (tmp_path / "b.txt").write_text("more text")
    with pytest.raises(UserError, match="other settings"):
        prepare(tmp_path)


def test_dataset_without_its_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "a.txt").write_text((ROOT / "LICENSE").read_text())
    prepare(tmp_path)
    (tmp_path / "a.txt").unlink()
    prepare(tmp_path)
    assert "the text that it was made from is not here" in capsys.readouterr().err


def test_missing_text_without_a_dataset_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="no file matches"):
        prepare(tmp_path)


def test_model_template_of_a_recipe(tmp_path: Path):
    tokenizer = tmp_path / "tokenizer.json"
    train_bpe(iter(["some text"]), 260).save(str(tokenizer))
    answer = {"role": "assistant", "content": "b"}
    talk = {"messages": [{"role": "user", "content": "a"}, answer]}
    (tmp_path / "a.jsonl").write_text(json_lines(talk))
    recipe = parse_recipe(
        TINY.format(data=tmp_path / "data"),
        [
            "data.source.kind=jsonl",
            "data.source.format=instructions",
            "data.source.val_fraction=0.0",
            f"data.source.path=['{tmp_path}/a.jsonl']",
            f"data.tokenizer.path={tokenizer}",
        ],
    )
    with pytest.raises(UserError, match="there is no chat template"):
        prepare_data(recipe)
    template = "{% for m in messages %}{{ m.content }}{{ bos_token }}{% endfor %}"
    prepare_data(recipe, (template, {"bos_token": "!"}))
    tokens, _ = open_dataset(tmp_path / "data").splits["train"].document(0)
    assert Tokenizer.from_file(str(tokenizer)).decode(tokens.tolist()) == "a!b!"
