"""The Typer app, its errors and its exit codes; each command is a file in ``commands/``."""

import contextlib
import itertools
import os
import re
import select
import sys
import traceback
from typing import IO, Any, NoReturn

import typer

from minigpt_cli.commands import (
    doctor,
    eval,
    export,
    finetune_lora,
    lr_find,
    plan,
    pretrain,
    recipes,
    report,
    resume,
    runs,
    sample,
    tokenize,
    verify,
)
from minigpt_cli.commands.options import Command, Debug, Group, Version, epilog
from minigpt_cli.core.console import discard_output, discarded_if_closed, error_line
from minigpt_cli.core.errors import Stopped, UserError
from minigpt_cli.core.signals import ignore_signals, stop_at_signals
from minigpt_cli.distributed.failure import announce_failure
from minigpt_cli.distributed.join import leave_world, session

_LONGEST_USAGE = 400  # characters

app = typer.Typer(
    name="minigpt",
    cls=Group,
    no_args_is_help=True,
    epilog=epilog("minigpt pretrain recipes/tiny.toml"),
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


@app.callback()
def options(version: Version = False, debug: Debug = False) -> None:
    """Pre-train GPT language models from one TOML recipe."""


def _add(name: str, command: Any, example: str) -> None:
    app.command(name, cls=Command, epilog=epilog(example))(command)


_add("tokenize", tokenize.tokenize_command, tokenize.EXAMPLE)
_add("pretrain", pretrain.pretrain_command, pretrain.EXAMPLE)
_add("plan", plan.plan_command, plan.EXAMPLE)
_add("resume", resume.resume_command, resume.EXAMPLE)
_add("finetune-lora", finetune_lora.finetune_lora_command, finetune_lora.EXAMPLE)
_add("lr-find", lr_find.lr_find_command, lr_find.EXAMPLE)
_add("eval", eval.eval_command, eval.EXAMPLE)
_add("sample", sample.sample_command, sample.EXAMPLE)
_add("export", export.export_command, export.EXAMPLE)
_add("runs", runs.runs_command, runs.EXAMPLE)
_add("verify", verify.verify_command, verify.EXAMPLE)
_add("report", report.report_command, report.EXAMPLE)
_add("doctor", doctor.doctor_command, doctor.EXAMPLE)
_add("recipes", recipes.recipes_command, recipes.EXAMPLE)


def main() -> None:
    """Run a command. An error that a user can meet becomes one line and an exit code."""
    try:
        code = _run(sys.argv[1:])
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of Rust, in a library
        if not (isinstance(error, Exception | Stopped) or is_panic):
            raise
        ignore_signals()
        if "--debug" in sys.argv:
            traceback.print_exc()
        code = _report(error)
        try:
            print(end="", flush=True)
        except OSError:  # its reader has gone, or its disk is full
            discard_output()
    if session.info is not None:
        _leave(code)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """Run a command; return its exit code. Signals stop it, and are ignored once it has ended."""
    try:
        stop_at_signals()
        _refuse_empty(arguments)
        code = app(arguments, prog_name="minigpt", standalone_mode=False)
        with discarded_if_closed():
            print(end="", flush=True)  # also where there is no standard output
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # typer and rich have replaced it
            if not arguments or {"-h", "--help"} & set(arguments):
                return 0
            raise end.__context__ from None
        raise
    finally:
        ignore_signals()
    return code if isinstance(code, int) else 0


def _refuse_empty(arguments: list[str]) -> None:
    """Refuse an empty value, such as a variable that the shell doesn't know: -o "$OUT"."""
    for before, value in itertools.pairwise(["", *arguments]):
        joined = re.fullmatch(r"(--[\w-]+)=", value)
        name = joined[1] if joined else before if before.startswith("-") else "an argument"
        if (joined or not value) and name != "--prompt":
            raise UserError(f"{name} is empty: is a variable of the shell not set?")


def _leave(code: int) -> NoReturn:
    """End one of several ranks at once: gloo's threads may abort the interpreter at its exit."""
    leave_world(patience=30 if code == 0 else 4)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


def _report_usage(error: Any) -> int:
    """Print a usage error in one line; return the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":  # the help has been printed
        return int(error.exit_code)
    context = getattr(error, "ctx", None)
    command = "minigpt" if context is None else context.command_path
    message = error.format_message().rstrip(".").replace("Value error, ", "")  # pydantic's words
    if len(message) > _LONGEST_USAGE:  # it quotes the argument
        message = f"{message[:_LONGEST_USAGE]}..."
    error_line(f"{message} (see {command} --help)")
    return int(error.exit_code)


def _is_closed(stream: IO[str]) -> bool:
    """Return whether the reader of a pipe has gone."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def _report(error: BaseException) -> int:
    """Print one line for an error; return the exit code."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return _report_usage(error)
    if isinstance(error, BrokenPipeError) and _is_closed(sys.stdout):  # `minigpt sample | head`
        return 0
    outcome = announce_failure(error)
    if outcome.is_shown_here:
        error_line(outcome.message)
    return outcome.code
