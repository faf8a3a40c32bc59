"""``minigpt resume``."""

from pathlib import Path
from typing import Annotated

import typer

from minigpt_cli.commands.launching import is_launcher, join_ranks, launch_ranks
from minigpt_cli.commands.options import RUN, Debug, Json, Nproc, Overrides, Version, option
from minigpt_cli.commands.training import fit_and_report, train_new_run
from minigpt_cli.core.run_dir import is_checkpoint, run_of

EXAMPLE = "minigpt resume runs/tiny"

RunPath = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run directory, or one checkpoint in it.")
]
AllowChange = Annotated[
    list[str] | None,
    option(
        "--allow-change",
        "SECTION.KEY",
        "Let --set change a setting that has shaped the training so far; may be repeated.",
        RUN,
    ),
]
OrStart = Annotated[
    Path | None,
    option(
        "--or-start",
        "RECIPE",
        "Start the run from this recipe if RUN holds no checkpoint yet.",
        RUN,
    ),
]


def resume_command(
    run: RunPath,
    overrides: Overrides = None,
    allow_change: AllowChange = None,
    or_start: OrStart = None,
    nproc: Nproc = None,
    as_json: Json = False,
    version: Version = False,
    debug: Debug = False,
) -> int:
    """Continue a run from its newest valid checkpoint.

    On the same devices and thread count the result is bit-identical to a run that never stopped.
    """
    from minigpt_cli.recipe import load_recipe

    if is_launcher(nproc):
        if or_start is not None:
            load_recipe(or_start, overrides)  # an error is shown before any process starts
        return launch_ranks(nproc, run_of(run))
    join_ranks()
    if or_start is not None:
        from minigpt_cli.checkpoint.store import holds_a_checkpoint
        from minigpt_cli.distributed.world import start_world

        recipe = load_recipe(or_start, overrides)
        world = start_world(recipe.distributed.timeout_minutes, run, recipe.train.deterministic)
        if not world.run_on_rank0(lambda: is_checkpoint(run) or holds_a_checkpoint(run), bool):
            train_new_run(recipe, or_start, run, as_json)
            return 0
    from minigpt_cli.train.start import resume_run

    fit_and_report(*resume_run(run, overrides or [], allow_change or []), as_json)
    return 0
