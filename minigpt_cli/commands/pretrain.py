"""``minigpt pretrain``."""

from pathlib import Path
from typing import Annotated

import typer

from minigpt_cli.commands.options import Debug, Json, Nproc, Overrides, RunDir, Version
from minigpt_cli.commands.training import train_recipe

EXAMPLE = "minigpt pretrain recipes/tiny.toml --set train.steps=500"


def pretrain_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; see recipes/.")],
    out: RunDir = None,
    overrides: Overrides = None,
    nproc: Nproc = None,
    as_json: Json = False,
    version: Version = False,
    debug: Debug = False,
) -> int:
    """Train a model from a recipe.

    The token dataset is made first if the recipe names a source and the dataset is not there yet.
    """
    return train_recipe(recipe, overrides, out, nproc, as_json, lora=False)
