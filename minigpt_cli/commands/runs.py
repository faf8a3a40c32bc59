"""``minigpt runs``."""

from pathlib import Path
from typing import Annotated

import typer

from minigpt_cli.commands.options import Debug, Json, Version
from minigpt_cli.core.console import log, print_json, print_result, terminal_width
from minigpt_cli.core.signals import nothing_is_saved

EXAMPLE = "minigpt runs"


def runs_command(
    directory: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="Where to look, at any depth.")
    ] = Path("runs"),
    as_json: Json = False,
    version: Version = False,
    debug: Debug = False,
) -> None:
    """List the runs under a directory, the newest first.

    Shows how each run stands: status, step, losses, tokens, training time and the last sign of
    life.
    """
    nothing_is_saved()
    from minigpt_cli.report.run_table import runs_json, runs_text
    from minigpt_cli.report.runs import find_runs

    nothing_yet = directory == Path("runs") and not directory.exists()
    found = [] if nothing_yet else find_runs(directory)
    if as_json:
        print_json({"directory": str(directory), "runs": runs_json(found)})
    elif found:
        print_result(runs_text(found, directory, terminal_width()))
    else:
        log(f"{directory}: no runs")
