"""The interface of a tracker: a function starts it, and returns the two that log and finish."""

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers know it.

    Attributes:
        directory: the run directory.
        name: its name, for people.
        id: the same as long as the run lives.
        part: 1, and one more each time the run goes back to an earlier step. For services that
            can't take rows back: they get a new run in the same group.
        step: the step after which the run goes on; 0 for a new run.
        is_evaluated: whether the evaluation at ``step`` is part of the curve already.
        recipe: the resolved recipe as TOML.
        settings: the same as nested tables.
    """

    directory: Path
    name: str
    id: str
    part: int
    step: int
    is_evaluated: bool
    recipe: str
    settings: dict[str, Any]

    @property
    def first_step(self) -> int:
        """The first step whose rows a tracker must forget; they are sent again, or anew."""
        return self.step + self.is_evaluated if self.step else 0

    @property
    def unique_name(self) -> str:
        """A name that no other run of a project has."""
        return f"{self.name}-{self.id}"

    def with_part(self, name: str) -> str:
        """Return a name for this part of the run."""
        return name if self.part == 1 else f"{name}-{self.part}"


@dataclass(frozen=True)
class Tracker:
    """A tracker that has started; it knows no row beyond the step from which the run goes on.

    Attributes:
        log: takes the step, the time (s since 1970) and the values by name: numbers, or texts.
        finish: takes the exit code of the command, or None if training goes on in another part.
        next_step: rows of earlier steps are there already.
        message: where to look, for people.
    """

    log: Callable[[int, float, dict[str, Any]], None]
    finish: Callable[[int | None], None]
    next_step: int
    message: str


def in_shell(path: Path | str) -> str:
    """Return a path for a command line in the working directory."""
    relative = os.path.relpath(path)
    return shlex.quote(os.path.abspath(path) if relative.startswith("..") else relative)
