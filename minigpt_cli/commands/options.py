"""What the commands share: options, the form of ``--help``, and its last paragraphs."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperCommand, TyperGroup

from minigpt_cli import __version__
from minigpt_cli.core.errors import UserError

EXIT_CODES = (
    "Exit codes: 0 done; 1 a bug or a lost process; 2 wrong input; 3 training diverged; 4 damaged "
    "data or checkpoint; 75 stopped by a signal with everything saved: go on with minigpt resume "
    "(tokenize: run it again); 130 the same after Ctrl-C."
)

_LONG_INTEGERS = ("seed", "shard_tokens")

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
    """A command. Its integers fit torch's, and no range of them clutters ``--help``."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        if self.help:  # a docstring's lines would be kept, and wrapped once more
            self.help = re.sub(r"(?<!\n)\n(?!\n)", " ", self.help)

    def invoke(self, ctx: Any) -> Any:
        for param in self.params:
            value = ctx.params.get(param.name)
            most = 2**63 - 1 if param.name in _LONG_INTEGERS else 2**31 - 1
            if isinstance(value, int) and abs(value) > most:
                raise UserError(f"{param.opts[0]}: must be from {-most} to {most}")
        return super().invoke(ctx)


class Group(_PlainParams, TyperGroup):
    """The command ``minigpt``, which holds all others."""


def option(names: str, metavar: str | None, help: str, panel: str, **settings: Any) -> Any:
    """Return an option for an ``Annotated`` parameter.

    Args:
        names: separated by spaces.
        metavar: what stands for the value in ``--help``; empty for a flag, None for a choice.
        help: one sentence.
        panel: the panel of ``--help`` that shows the option.
        settings: of typer.Option.
    """
    return typer.Option(
        *names.split(), metavar=metavar, help=help, rich_help_panel=panel, **settings
    )


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
Json = Annotated[bool, option("--json", "", "Print one JSON object on standard output.", OUTPUT)]

RunDir = Annotated[
    Path | None,
    option("--out -o", "DIR", "The run directory; default: runs/ and the recipe's name.", RUN),
]
Overrides = Annotated[
    list[str] | None,
    option("--set", "SECTION.KEY=VALUE", "Override a setting of the recipe; may be repeated.", RUN),
]
Nproc = Annotated[
    int | None,
    option(
        "--nproc --nproc-per-node",
        "N",
        "Start N processes on this machine, one per GPU.",
        PROCESSES,
        min=1,
    ),
]
DryRun = Annotated[
    bool,
    option(
        "--dry-run",
        "",
        "Do all but train: check everything, and print the first sequence. Leaves no run.",
        RUN,
    ),
]
OverfitOneBatch = Annotated[
    bool,
    option(
        "--overfit-one-batch",
        "",
        "Train on one batch until its loss is below 0.1 (exit code 3 after 500 steps). Leaves no "
        "run.",
        RUN,
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
    option(
        "--adapter",
        "DIR",
        "An adapter for MODEL: a finetune-lora run, or a directory in PEFT's format.",
        "Model",
    ),
]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
Device = Annotated[
    str | None,
    option("--device", "NAME", "cpu, cuda or cuda:1; default: a GPU if there is one.", "Model"),
]
