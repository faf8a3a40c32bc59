"""Environment variables that hold numbers; anybody may have set them to anything."""

import os
import re

from minigpt_cli.core.errors import UserError


def env_int(name: str, default: int | None = None, *, least: int = 0, hint: str = "") -> int:
    """Read an integer from an environment variable; empty counts as not set.

    Args:
        name: The variable.
        default: Returned if it is not set; None: it must be set.
        least: The smallest value that is allowed.
        hint: How to mend it.

    Raises:
        UserError: It is no such integer, or it is missing.
    """
    text = os.environ.get(name, "").strip()
    if not text and default is not None:
        return default
    hint = hint or "correct it, or unset it"
    if not text:
        raise UserError(f"{name} is not set: {hint}")
    if re.fullmatch(r"-?[0-9]{1,18}", text) is None:  # int() takes 1_0, too
        raise UserError(f"{name} is {text[:40]!r}, not an integer: {hint}")
    value = int(text)
    if value < least:
        raise UserError(f"{name} is {value}, expected at least {least}: {hint}")
    return value


def check_omp_num_threads() -> None:
    """Check OMP_NUM_THREADS before torch reads it; an empty one is removed.

    Raises:
        UserError: It is not a number of threads, or several, one for each level of nesting.
    """
    text = os.environ.get("OMP_NUM_THREADS")
    if text is None:
        return
    if not text.strip():
        del os.environ["OMP_NUM_THREADS"]
        return
    for part in map(str.strip, text.split(",")):
        if not (part.isascii() and part.isdigit() and len(part) < 6 and int(part) > 0):
            raise UserError(
                f"OMP_NUM_THREADS is {text[:40]!r}, not a number of threads: correct it, or unset "
                "it"
            )
