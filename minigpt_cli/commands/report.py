"""``minigpt report``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt_cli.commands.options import OUTPUT, Debug, Json, Version, option
from minigpt_cli.core.console import counted, log, print_json, print_result
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.signals import nothing_is_saved

if TYPE_CHECKING:
    from minigpt_cli.report.run_contents import RunContents

EXAMPLE = "minigpt report runs/tiny runs/other -o page.html"
PAGE = "report.html"

Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN", help="Run directories: finished, running or dead.")
]
PageFile = Annotated[
    Path | None,
    option("--out -o", "FILE", f"The page; default: RUN/{PAGE}, if there is one RUN.", OUTPUT),
]
PngFile = Annotated[
    Path | None,
    option("--png", "FILE", "Also draw the main curves as an image; needs matplotlib.", OUTPUT),
]


def report_command(
    runs: Runs,
    out: PageFile = None,
    png: PngFile = None,
    as_json: Json = False,
    version: Version = False,
    debug: Debug = False,
) -> None:
    """Make an HTML page of a run, or of several.

    It is one file that loads nothing: curves, incidents, samples, recipe and more (docs/report.md).
    """
    nothing_is_saved()
    from minigpt_cli.core.files import write_atomically
    from minigpt_cli.report.figure import (
        PNG_MARKER,
        PNG_MARKER_WITHIN,
        check_matplotlib,
        render_png,
    )
    from minigpt_cli.report.page import MARKER, MARKER_WITHIN, render_page
    from minigpt_cli.report.run_contents import read_run, runs_by_name

    found = runs_by_name(runs)
    if out is None:
        if len(found) > 1:
            raise UserError(f"{len(found)} runs make one page: say where, with -o page.html")
        out = next(iter(found.values())) / PAGE
    _check_output("-o", out, MARKER, MARKER_WITHIN)
    if png is not None:
        check_matplotlib()
        if png.resolve() == out.resolve():
            raise UserError(f"--png {png}: is the page's file; choose another one")
        _check_output("--png", png, PNG_MARKER, PNG_MARKER_WITHIN)

    contents = [read_run(path, name) for name, path in found.items()]
    for run in contents:
        for problem in run.problems:
            log(f"left out: {problem}")
    page = render_page(contents).encode()
    image = b"" if png is None else render_png(contents)
    for file, content in ((out, page), (png, image)):
        if file is not None:
            try:
                write_atomically(file, content)
            except OSError as error:
                raise UserError(f"{file}: can't be written to: {error.strerror}") from None
    if as_json:
        image_file = None if png is None else str(png)
        print_json({"page": str(out), "png": image_file, "runs": [*map(_result, contents)]})
    else:
        print_result(f"{out}: {counted(len(contents), 'run')}, {len(page) / 1e3:,.0f} kB")
        if png is not None:
            print_result(f"{png}: {len(image) / 1e3:,.0f} kB")


def _check_output(name: str, file: Path, marker: bytes, within: int) -> None:
    """Refuse to write where something is that the user may want to keep.

    Args:
        name: of the option.
        file: its value.
        marker: what only files of this command hold, ``within`` so many first bytes.
    """
    from minigpt_cli.core.reading import open_regular

    if file.is_dir():
        raise UserError(f"{name} {file}: is a directory; name a file in it")
    if not file.parent.is_dir():
        raise UserError(f"{name} {file}: there is no directory {file.parent}; make it first")
    if file.is_symlink() and not file.exists():
        raise UserError(f"{name} {file}: is a link to nothing; choose another file")
    if not file.exists():
        return
    with open_regular(file, limit=1 << 40) as stream:
        if marker not in stream.read(within):
            raise UserError(
                f"{name} {file}: exists, and minigpt report did not make it: choose another file, "
                "or delete it"
            )


def _result(run: "RunContents") -> dict[str, Any]:
    from minigpt_cli.report.numbers import numbers_of

    found = {"run": str(run.path), "name": run.name, "status": run.state} | asdict(numbers_of(run))
    return found | {
        "incidents": len(run.incidents),
        "rollbacks": sum(each.kind == "rollback" for each in run.incidents),
        "checkpoints": [saved.step for saved in run.checkpoints],
        "problems": run.problems,
    }
