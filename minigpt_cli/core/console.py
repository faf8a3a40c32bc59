"""Log lines, warnings and errors on standard error; standard output is for results.

rich is imported at the first line that needs it: commands that print nothing start faster.
"""

import contextlib
import sys
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

_quiet = False


def set_quiet() -> None:
    """Print no more log lines and warnings: another rank speaks for all."""
    global _quiet
    _quiet = True
    if console.cache_info().currsize:
        console().quiet = True


@lru_cache(maxsize=1)
def console() -> "Console":
    """Return the one console for standard error. Lines appear above a live display on it."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=_quiet)


def log(message: str, style: str | None = None) -> None:
    """Print a line. A terminal that is gone doesn't end the work."""
    with contextlib.suppress(OSError):
        console().print(message, style=style, markup=False)


def warn(message: str) -> None:
    """Print a warning."""
    log(f"warning: {message}", style="yellow")


def error_line(message: str) -> None:
    """Print the line that says why a command failed, in one write: several ranks may print."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"minigpt: {message}\n")
        sys.stderr.flush()
