from pathlib import Path

import pytest

from minigpt_cli.core.errors import UserError
from minigpt_cli.prepare.from_recipe import prepare_data
from minigpt_cli.recipe import Recipe, parse_recipe
from tests.helpers.processes import ROOT
from tests.helpers.recipes import TINY


def prepared(folder: Path, *overrides: str) -> Recipe:
    text = TINY.format(data=folder / "data")
    source = ["data.source.kind=files", f"data.source.path=['{folder}/*.txt']"]
    recipe = parse_recipe(text, [*source, "data.tokenizer.train_vocab=300", *overrides])
    prepare_data(recipe)
    return recipe


def test_the_dataset_is_made_once_and_refused_to_other_settings(tmp_path: Path):
    (tmp_path / "a.txt").write_text((ROOT / "LICENSE").read_text())
    prepared(tmp_path)
    manifest = (tmp_path / "data/dataset.json").read_bytes()
    prepared(tmp_path)
    assert (tmp_path / "data/dataset.json").read_bytes() == manifest
    with pytest.raises(UserError, match="other settings"):
        prepared(tmp_path, "data.tokenizer.train_vocab=310")
    (tmp_path / "b.txt").write_text("more text")
    with pytest.raises(UserError, match="other settings"):
        prepared(tmp_path)


def test_a_dataset_whose_text_is_elsewhere_is_used_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a.txt").write_text((ROOT / "LICENSE").read_text())
    prepared(tmp_path)
    (tmp_path / "a.txt").unlink()
    prepared(tmp_path)
    assert "the text that it was made from is not here" in capsys.readouterr().err


def test_missing_text_without_a_dataset_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match="no file matches"):
        prepared(tmp_path)
