"""``minigpt finetune-lora``."""

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

EXAMPLE = "minigpt finetune-lora recipes/shakespeare-lora.toml --set lora.base=runs/shakespeare"


def finetune_lora_command(
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A TOML file with a section \\[lora].")
    ],
    out: RunDir = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    overfit_one_batch: OverfitOneBatch = False,
    nproc: Nproc = None,
    as_json: Json = False,
    version: Version = False,
    debug: Debug = False,
) -> int:
    """Train LoRA adapters on a frozen base model.

    Checkpoints, stopping and resuming work as with pretrain.
    """
    trial = choose_trial(dry_run, overfit_one_batch, out)
    return train_recipe(recipe, overrides, out, nproc, as_json, lora=True, trial=trial)
