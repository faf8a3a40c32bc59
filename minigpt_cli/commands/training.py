"""What ``pretrain``, ``finetune-lora`` and ``resume`` share."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from minigpt_cli.commands.launching import is_launcher, join_ranks, launch_ranks
from minigpt_cli.core.console import log, print_json
from minigpt_cli.core.errors import Diverged, UserError
from minigpt_cli.core.signals import nothing_is_saved
from minigpt_cli.distributed.join import is_rank0

if TYPE_CHECKING:
    from minigpt_cli.checkpoint.state import RunState
    from minigpt_cli.recipe import Recipe
    from minigpt_cli.train.run import Run

# What to do in place of a run.
TrialKind = Literal["dry-run", "overfit"]


def train_recipe(
    recipe_file: Path,
    overrides: list[str] | None,
    out: Path | None,
    nproc: int | None,
    as_json: bool,
    *,
    lora: bool,
    trial: TrialKind | None = None,
) -> int:
    """Train what a recipe describes, in this process or in ``nproc`` of them.

    Args:
        lora: whether the recipe must have a [lora] section; otherwise it must have none.
        trial: what to do in place of a run; None: train.

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
        return launch_ranks(nproc, directory if trial is None else None)
    if trial is None:
        train_new_run(recipe, recipe_file, directory, as_json)
        return 0
    nothing_is_saved()
    if trial == "dry-run":
        _dry_run(recipe, recipe_file, directory, as_json)
    else:
        _overfit(recipe, as_json)
    return 0


def choose_trial(dry_run: bool, overfit_one_batch: bool, out: Path | None) -> TrialKind | None:
    """Return what the options ask for in place of a run.

    Raises:
        UserError: they contradict each other.
    """
    if dry_run and overfit_one_batch:
        raise UserError("--dry-run doesn't train, and --overfit-one-batch does: give one of them")
    if overfit_one_batch and out is not None:
        raise UserError("--overfit-one-batch leaves no run: leave out --out")
    if dry_run:
        return "dry-run"
    return "overfit" if overfit_one_batch else None


def _dry_run(recipe: "Recipe", recipe_file: Path, directory: Path, as_json: bool) -> None:
    from minigpt_cli.train.dry_run import dry_run
    from minigpt_cli.train.start_checks import check_recipe_is_elsewhere

    check_recipe_is_elsewhere(recipe_file, directory)
    dry_run(recipe, directory, as_json)


def _overfit(recipe: "Recipe", as_json: bool) -> None:
    from minigpt_cli.train.overfit import describe_overfit, overfit_one_batch

    result = overfit_one_batch(recipe)
    if as_json and is_rank0():
        print_json(asdict(result) | {"learned": result.is_learned})
    if not result.is_learned:
        raise Diverged(describe_overfit(result))
    log(describe_overfit(result))


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
