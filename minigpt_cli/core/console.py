"""Log lines, warnings and errors on standard error; standard output is for results.

rich is imported when the first line is printed: commands that print nothing start faster.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_quiet = False


def set_quiet() -> None:
    """Print no more log lines and warnings: rank 0 prints them for all ranks."""
    global _quiet
    _quiet = True
    if console.cache_info().currsize:
        console().quiet = True


@lru_cache(maxsize=1)
def console() -> "Console":
    """Return the one console for standard error. It prints lines above a live display."""
    from rich.console import Console

    class LogConsole(Console):
        def on_broken_pipe(self) -> None:
            """Print no more when the reader has gone, where rich would end the program."""
            self.quiet = True

    return LogConsole(stderr=True, highlight=False, soft_wrap=True, quiet=_quiet)


def log(message: str, style: str | None = None) -> None:
    """Print a line. If the terminal has gone, the work goes on."""
    with contextlib.suppress(OSError):
        console().print(message, style=style, markup=False)


def warn(message: str) -> None:
    """Print a warning."""
    log(f"warning: {message}", style="yellow")


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: "1 document", "2,000 documents"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def error_line(message: str) -> None:
    """Print why a command failed, in one write: several ranks may print at once."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"minigpt: {message}\n")
        sys.stderr.flush()


def print_json(value: object) -> None:
    """Print the result of ``--json``: one object on one line of standard output."""
    import json  # here, so that --help starts faster

    print_result(json.dumps(value))


def print_result(line: str) -> None:
    """Print a line to standard output. If its reader has gone (``| head``), the command goes on."""
    with discarded_if_closed():
        print(line, flush=True)


@contextlib.contextmanager
def discarded_if_closed() -> Iterator[None]:
    """Send standard output nowhere, from now on, if its reader has gone."""
    try:
        yield
    except BrokenPipeError:
        discard_output()


def discard_output() -> None:
    """Send standard output nowhere, from now on, so that Python's flush at exit can't fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
