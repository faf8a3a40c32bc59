"""What ``pretrain``, ``finetune-lora`` and ``resume`` share."""

from pathlib import Path
from typing import TYPE_CHECKING

from minigpt_cli.commands.launching import is_launcher, join_ranks, launch_ranks
from minigpt_cli.core.console import print_json
from minigpt_cli.core.errors import UserError

if TYPE_CHECKING:
    from minigpt_cli.checkpoint.state import RunState
    from minigpt_cli.recipe import Recipe
    from minigpt_cli.train.run import Run


def train_recipe(
    recipe_file: Path,
    overrides: list[str] | None,
    out: Path | None,
    nproc: int | None,
    as_json: bool,
    *,
    lora: bool,
) -> int:
    """Train what a recipe describes, in this process or in ``nproc`` of them.

    Args:
        lora: whether the recipe must have a [lora] section; otherwise it must have none.

    Returns:
        The exit code.
    """
    from minigpt_cli.train.batch import micro_batch_size_of

    launcher = is_launcher(nproc)
    if not launcher:
        join_ranks()  # then only rank 0 shows an error in the recipe
    recipe = _load(recipe_file, overrides, lora)
    directory = out or Path("runs") / recipe.name
    if launcher:
        assert nproc is not None
        micro_batch_size_of(recipe, nproc)  # an error is shown before any process starts
        return launch_ranks(nproc, directory)
    train_new_run(recipe, recipe_file, directory, as_json)
    return 0


def train_new_run(recipe: "Recipe", recipe_file: Path, directory: Path, as_json: bool) -> None:
    """Start a run in ``directory`` and train it to its end."""
    from minigpt_cli.train.start import start_run
    from minigpt_cli.train.start_checks import check_recipe_is_elsewhere

    check_recipe_is_elsewhere(recipe_file, directory)
    fit_and_report(*start_run(recipe, directory), as_json)


def fit_and_report(run: "Run", state: "RunState", as_json: bool) -> None:
    """Train a run to its end; with ``as_json``, rank 0 prints where it ended."""
    from minigpt_cli.train.loop import fit

    fit(run, state)
    if as_json and run.world.rank == 0:
        print_json(
            {
                "run": str(run.directory),
                "step": state.step,
                "tokens": state.tokens,
                "val_loss": state.val_loss,
                "best_val_loss": state.best_val_loss,
                "best_step": state.best_step,
            }
        )


def _load(recipe_file: Path, overrides: list[str] | None, lora: bool) -> "Recipe":
    from minigpt_cli.recipe import load_recipe

    recipe = load_recipe(recipe_file, overrides)
    if recipe.lora is not None and not lora:
        raise UserError(
            f"{recipe_file}: has a section [lora], which pretrain doesn't train; run minigpt "
            f"finetune-lora {recipe_file}"
        )
    if recipe.lora is None and lora:
        raise UserError(
            f"{recipe_file}: has no section [lora]; add one, or train the whole model with minigpt "
            f"pretrain {recipe_file}"
        )
    return recipe
