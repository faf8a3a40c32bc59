"""``minigpt lr-find``."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from minigpt_cli.commands.launching import is_launcher, join_ranks, launch_ranks
from minigpt_cli.commands.options import (
    OUTPUT,
    Debug,
    Json,
    Nproc,
    Overrides,
    Version,
    option,
)
from minigpt_cli.core.console import (
    console,
    log,
    print_json,
    print_result,
    printable,
    terminal_width,
)
from minigpt_cli.core.errors import Diverged, UserError

EXAMPLE = "minigpt lr-find recipes/tiny.toml --budget 200 -o rates.json"

SEARCH = "Search"

Out = Annotated[
    Path | None, option("--out -o", "FILE", "Also write the result to this new JSON file.", OUTPUT)
]
First = Annotated[float, option("--from", "RATE", "The range test's first optimizer.lr.", SEARCH)]
Last = Annotated[float, option("--to", "RATE", "The range test's last optimizer.lr.", SEARCH)]
Steps = Annotated[int, option("--steps", "N", "Steps of the range test.", SEARCH, min=10)]
Budget = Annotated[
    int,
    option("--budget", "N", "Steps of each candidate; at most the recipe's.", SEARCH, min=1),
]


def lr_find_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; see recipes/.")],
    first: First = 1e-5,
    last: Last = 1.0,
    steps: Steps = 100,
    budget: Budget = 100,
    overrides: Overrides = None,
    nproc: Nproc = None,
    out: Out = None,
    as_json: Json = False,
    version: Version = False,
    debug: Debug = False,
) -> int:
    """Find a learning rate by short trainings.

    A range test gives a few candidates. Each one, and the recipe's own rate, is trained for a short
    while; the advice is the one with the lowest validation loss. No run is made.
    """
    from minigpt_cli.recipe import load_recipe
    from minigpt_cli.train.batch import micro_batch_size_of

    launcher = is_launcher(nproc)
    if not launcher:
        join_ranks()  # then only rank 0 shows an error
    _check_rates(first, last)
    if out is not None:
        _check_out(out)
    loaded = load_recipe(recipe, overrides)
    if launcher:
        assert nproc is not None
        micro_batch_size_of(loaded, nproc)  # an error is shown before any process starts
        return launch_ranks(nproc, None)
    from minigpt_cli.analysis.lr_find import LrSearch, find_lr
    from minigpt_cli.analysis.lr_report import findings_json, findings_text
    from minigpt_cli.distributed.join import is_rank0

    with _progress() as show:
        findings = find_lr(loaded, LrSearch(first, last, steps, budget), show)
    if is_rank0():
        result = findings_json(loaded, findings)
        if as_json:
            print_json(result)
        else:
            width = terminal_width() or 80
            text = findings_text(loaded, str(recipe), findings, width)
            print_result(printable(text, keep="\n"))
        if out is not None:
            _write(out, result)
            log(f"{out}: the result as JSON")
    if findings.best is None:
        raise Diverged(
            "all candidates diverged: try a longer schedule.warmup_steps, or lower rates with "
            "--from, --to and --set optimizer.lr=RATE"
        )
    return 0


def _check_rates(first: float, last: float) -> None:
    for name, rate in (("--from", first), ("--to", last)):
        if not (math.isfinite(rate) and rate > 0):
            raise UserError(f"{name} {rate:g}: expected a number above 0")
    if first >= last:
        raise UserError(f"--from {first:g}: must be below --to {last:g}")


def _check_out(out: Path) -> None:
    """Refuse a file that can't be written, before minutes of work."""
    if os.path.lexists(out):
        raise UserError(f"{out}: already exists; choose another -o, or delete it")
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no directory {out.parent}; make it, or choose another -o")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"{out}: can't be written to: {out.parent} is read-only for you")


def _write(out: Path, result: dict[str, Any]) -> None:
    import json

    from minigpt_cli.core.files import os_reason, write_new_file

    try:
        write_new_file(out, (json.dumps(result, indent=1) + "\n").encode())
    except FileExistsError:
        raise UserError(f"{out}: another process has made it meanwhile; nothing written") from None
    except OSError as error:
        raise UserError(f"{out}: can't be written: {os_reason(error)}") from None


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Give a function that shows how far a training is: as a bar, on a terminal only."""
    if not console().is_terminal:
        yield lambda name, done, total: None
        return
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        console=console(),
        transient=True,
    )
    tasks: dict[str, progress.TaskID] = {}

    def show(name: str, done: int, total: int) -> None:
        with contextlib.suppress(OSError):  # the terminal may have gone
            if name not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done)

    with contextlib.suppress(OSError):
        bar.start()
    try:
        yield show
    finally:
        with contextlib.suppress(OSError):
            bar.stop()
