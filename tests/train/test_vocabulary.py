"""The padded vocabulary of a new run, in its recipe.toml, its checkpoints and its export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minigpt_cli.checkpoint.tensors import WEIGHTS_PREFIX
from minigpt_cli.core.errors import UserError
from minigpt_cli.model.config import padded_vocabulary, with_vocabulary
from minigpt_cli.recipe import Recipe, dump_recipe
from minigpt_cli.train.start_checks import check_earlier_recipe
from tests.helpers.commands import finished
from tests.helpers.runs import whole_tensors

MakeRecipe = Callable[..., Recipe]
SIZE, ROWS = 320, 384  # of the dataset's tokenizer, and of a new model's embeddings


@pytest.mark.parametrize(
    ("size", "rows"), [(1, 128), (128, 128), (129, 256), (257, 384), (50_257, 50_304)]
)
def test_rows(size: int, rows: int):
    assert padded_vocabulary(size) == rows


def embeddings(run: Path, step: int) -> list[int]:
    tensors = whole_tensors(run / f"checkpoints/step-{step:08d}")
    return list(tensors[WEIGHTS_PREFIX + "embed_tokens.weight"].shape)


def test_a_run_keeps_its_size(recipe_file: Path, tmp_path: Path):
    run = tmp_path / "run"
    finished("pretrain", recipe_file, "--out", run, "--set", "train.steps=4")
    assert f"\nvocab_size = {ROWS}  # default\n" in (run / "recipe.toml").read_text()
    finished("resume", run, "--set", "train.steps=5")
    assert embeddings(run, 4) == embeddings(run, 5) == [ROWS, 32]

    padding = list(range(SIZE, ROWS))
    config = json.loads((run / "final/config.json").read_text())
    assert config["vocab_size"] == ROWS
    generation = json.loads((run / "final/generation_config.json").read_text())
    assert generation["suppress_tokens"] == padding
    theirs = AutoModelForCausalLM.from_pretrained(run / "final").eval()
    with torch.no_grad():  # whatever the last hidden state is, one of the two rows wins
        theirs.lm_head.weight[SIZE] = 1000 * torch.randn(32)
        theirs.lm_head.weight[SIZE + 1] = -theirs.lm_head.weight[SIZE]
    assert not set(written(theirs)) & set(padding)
    theirs.generation_config.suppress_tokens = None
    assert set(written(theirs)) & set(padding)

    adapter = tmp_path / "adapter.toml"
    text = recipe_file.read_text()
    begin, end = text.index("[model]"), text.index("[train]")
    adapter.write_text(f'{text[:begin]}[lora]\nbase = "{run}"\nrank = 2\n{text[end:]}')
    finished("finetune-lora", adapter, "--out", tmp_path / "adapted", "--set", "train.steps=3")
    assert f"vocab_size = {ROWS}  # base\n" in (tmp_path / "adapted/recipe.toml").read_text()
    finished("export", run, tmp_path / "merged", "--adapter", tmp_path / "adapted")
    merged = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert merged["suppress_tokens"] == padding


def written(model: Any) -> list[int]:
    ids = torch.tensor([[1, 2, 3]])
    found: list[int] = model.generate(ids, max_new_tokens=8, do_sample=False)[0, 3:].tolist()
    return found


@pytest.mark.parametrize("size", [SIZE, 333])
def test_a_given_size_is_taken(make_recipe: MakeRecipe, size: int):
    recipe = make_recipe(f"model.vocab_size={size}")
    assert with_vocabulary(recipe, SIZE) == recipe


def test_a_run_that_died_early_starts_again(make_recipe: MakeRecipe, tmp_path: Path):
    """Its recipe.toml holds a size that the recipe doesn't have."""
    resolved = with_vocabulary(make_recipe(), SIZE)
    assert resolved.model.vocab_size == ROWS
    (tmp_path / "recipe.toml").write_text(dump_recipe(resolved))
    check_earlier_recipe(make_recipe(), tmp_path)
    with pytest.raises(UserError, match=r"another model.vocab_size"):
        check_earlier_recipe(make_recipe("model.vocab_size=320"), tmp_path)
