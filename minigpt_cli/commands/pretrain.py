"""``minigpt pretrain``."""

from pathlib import Path
from typing import Annotated

import typer

from minigpt_cli.commands.options import (
    Debug,
    DryRun,
    Json,
    Nproc,
    OverfitOneBatch,
    Overrides,
    RunDir,
    Version,
)
from minigpt_cli.commands.training import choose_trial, train_recipe

EXAMPLE = "minigpt pretrain recipes/tiny.toml --set train.steps=500"


def pretrain_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; see recipes/.")],
    out: RunDir = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    overfit_one_batch: OverfitOneBatch = False,
    nproc: Nproc = None,
    as_json: Json = False,
    version: Version = False,
    debug: Debug = False,
) -> int:
    """Train a model from a recipe.

    The token dataset is made first if the recipe names a source and the dataset is not there yet.
    """
    trial = choose_trial(dry_run, overfit_one_batch, out)
    return train_recipe(recipe, overrides, out, nproc, as_json, lora=False, trial=trial)
