"""Log lines, warnings and errors on standard error; standard output is for results.

rich is imported when the first line is printed: commands that print nothing start faster.
"""

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_LONGEST = 960  # characters of a message; it may quote a received file
_LONG_WORD = re.compile(r"(\S{400})\S+")  # longer than paths are
# Control characters but tabs, separators of lines, marks that reorder text, half surrogate pairs
_CONTROL = re.compile(
    "[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)

_quiet = False


def set_quiet() -> None:
    """Print no more log lines and warnings: rank 0 prints them for all ranks."""
    global _quiet
    _quiet = True
    if console.cache_info().currsize:
        console().quiet = True


def printable(text: str, keep: str = "") -> str:
    """Return a text that can't write commands to a terminal.

    Args:
        text: Any text.
        keep: Control characters to leave as they are.

    Returns:
        The text with ``\\xNN`` or ``\\uNNNN`` in place of control characters.
    """

    def escaped(match: re.Match[str]) -> str:
        code = ord(match[0])
        if match[0] in keep:
            return match[0]
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return _CONTROL.sub(escaped, text)


def _shortened(message: str) -> str:
    message = _LONG_WORD.sub(r"\1...", message)
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]}..."


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
    """Print one or more lines. If the terminal has gone, the work goes on."""
    from rich.text import Text

    with contextlib.suppress(OSError):  # the style is the text's: it must not color a live view
        console().print(Text(printable(message, keep="\n"), style=style or ""))


def warn(message: str) -> None:
    """Print a warning."""
    log(f"warning: {printable(_shortened(message))}", style="yellow")


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: "1 document", "2,000 documents"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def terminal_width() -> int | None:
    """Return the columns of the terminal that standard output goes to; None if it is none.

    ``COLUMNS`` in the environment wins, as everywhere.
    """
    return shutil.get_terminal_size((0, 0)).columns or None


def error_line(message: str) -> None:
    """Print why a command failed, in one write: several ranks may print at once.

    Args:
        message: One line; or a list, each further item after a line break and two spaces.
    """
    items = [printable(_shortened(item)) for item in message.split("\n  ")]
    with contextlib.suppress(OSError):
        sys.stderr.write("minigpt: " + "\n  ".join(items) + "\n")
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
