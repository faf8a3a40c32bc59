"""A trained model from a run or a checkpoint, for everything but training."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minigpt_cli import recipe as recipes
from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.tensors import load_weights
from minigpt_cli.data.tokenizer import load_tokenizer, vocabulary_size
from minigpt_cli.errors import UserError
from minigpt_cli.model.config import config_from_recipe
from minigpt_cli.model.gpt import GPT
from minigpt_cli.recipe import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class TrainedModel:
    model: GPT
    tokenizer: "Tokenizer"
    recipe: Recipe
    step: int
    checkpoint: Path
    passed_over: list[str]  # newer checkpoints that are damaged, and how


def load_model(path: Path, device: torch.device) -> TrainedModel:
    """The model at ``path``, a run directory or one of its checkpoints, in evaluation mode.

    Raises:
        UserError: there is no model there.
        Damaged: no checkpoint is valid.
    """
    run, checkpoint, manifest, passed_over = store.choose(path)
    recipe = recipes.load(checkpoint / "recipe.toml", name=run.name)
    tokenizer = load_tokenizer(checkpoint / "tokenizer.json")
    fp64 = recipe.precision.dtype == "fp64"
    model = GPT(config_from_recipe(recipe, vocabulary_size(tokenizer)))
    model.to(device, torch.float64 if fp64 else torch.float32)
    load_weights(checkpoint, manifest.tensors, model)
    model.eval()
    return TrainedModel(model, tokenizer, recipe, manifest.step, checkpoint, passed_over)


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run under ``runs`` that saved a checkpoint last.

    Raises:
        UserError: none has.
    """
    newest = [
        (steps[-1][1].stat().st_mtime, directory)
        for directory in (sorted(runs.iterdir()) if runs.is_dir() else [])
        if (steps := store.list_steps(directory))
    ]
    if not newest:
        raise UserError(f"{runs}/ holds no trained run: name a run directory or a checkpoint")
    return max(newest)[1]
