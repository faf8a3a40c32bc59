"""What the commands share: options, the form of ``--help``, and its last paragraphs."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from minigpt_cli import __version__

EXIT_CODES = (
    "Exit codes: 0 done; 1 a bug or a lost process; 2 wrong input; 3 training diverged; 4 damaged "
    "data or checkpoint; 75 stopped by a signal with everything saved, run it again; 130 the same "
    "after Ctrl-C."
)

# Panels of --help.
RUN, PROCESSES, OUTPUT = "Run", "Processes", "Output"


class _PlainParams:
    """Hides Python's types in ``--help``: <bool> beside flags, <path> beside arguments."""

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
            elif param.param_type_name == "argument":
                param.display_type_rich = lambda ctx: ""
        return params


class Command(_PlainParams, TyperCommand):
    """A command."""


class Group(_PlainParams, TyperGroup):
    """The command ``minigpt``, which holds all others."""


def epilog(example: str) -> str:
    """Return the end of a command's ``--help``."""
    return f"Example: {example}\n\n{EXIT_CODES}"


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"minigpt {__version__}")
        raise typer.Exit


# Every command takes these two. --version acts as soon as it is read; cli.main() looks for --debug.
Version = Annotated[
    bool,
    typer.Option(
        "--version",
        callback=_show_version,
        is_eager=True,
        help="Show the version and exit.",
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="Print one JSON object on standard output.", rich_help_panel=OUTPUT
    ),
]

RunDir = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        metavar="DIR",
        help="The run directory; default: runs/ and the recipe's name.",
        rich_help_panel=RUN,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.KEY=VALUE",
        help="Override a setting of the recipe; may be repeated.",
        rich_help_panel=RUN,
    ),
]
Nproc = Annotated[
    int | None,
    typer.Option(
        "--nproc",
        "--nproc-per-node",
        metavar="N",
        min=1,
        help="Start N processes on this machine, one per GPU.",
        rich_help_panel=PROCESSES,
    ),
]

ModelPath = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="A run, a checkpoint, a Hugging Face directory or Hub id, or an adapter.",
    ),
]
Adapters = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter",
        metavar="DIR",
        help="An adapter for MODEL: a finetune-lora run, or a directory in PEFT's format.",
        rich_help_panel="Model",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        help="cpu, cuda or cuda:1; default: a GPU if there is one.",
        rich_help_panel="Model",
    ),
]
