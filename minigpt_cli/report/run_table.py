"""Runs as a table for a terminal, and as JSON."""

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from minigpt_cli.core.console import printable
from minigpt_cli.core.duration import duration
from minigpt_cli.core.text_table import text_table
from minigpt_cli.report.runs import RunSummary

_HEADER = ["status", "step", "loss", "val", "tokens", "time", "when"]
_SHORTEST_NAME = 12
_MOST_NOTES = 10
_LONGEST = 300  # characters of a message
_WITH_NOTES = ("failed", "diverged", "unknown", "damaged")


def runs_json(runs: list[RunSummary]) -> list[dict[str, Any]]:
    """Return each run as a JSON object."""
    return [dataclasses.asdict(run) | {"path": str(run.path)} for run in runs]


def runs_text(runs: list[RunSummary], directory: Path, width: int | None) -> str:
    """Return a table of runs, and below it why some of them failed.

    Args:
        runs: at least one.
        directory: where they were found.
        width: columns of the terminal; None: any. If it is too narrow for the paths, they begin in
            ``directory``, and the longest ones are shortened.
    """
    header, rows = ["run", *_HEADER], [[printable(str(run.path)), *_numbers(run)] for run in runs]
    if width is not None:
        without_names = text_table(["", *_HEADER], [["", *row[1:]] for row in rows], left=(0, 1))
        room = width - max(map(len, without_names.splitlines()))
        if max(len(row[0]) for row in rows) > room:
            header[0] = f"in {directory}"
            names = [printable(_relative(run.path, directory)) for run in runs]
            room = max(room, _SHORTEST_NAME)
            rows = [
                [_shortened(name, room), *row[1:]] for name, row in zip(names, rows, strict=True)
            ]
            header[0] = _shortened(header[0], room)
    lines = [text_table(list(map(printable, header)), rows, left=(0, 1))]
    noted = [run for run in runs if run.status in _WITH_NOTES and run.message]
    lines += [printable(f"{run.path}: {run.message[:_LONGEST]}") for run in noted[:_MOST_NOTES]]
    if len(noted) > _MOST_NOTES:
        lines.append(f"{len(noted) - _MOST_NOTES} more messages: --json shows all")
    return "\n".join(lines)


def _relative(path: Path, directory: Path) -> str:
    """Return a path as seen from the directory; a run that is the directory itself has its name."""
    return path.name if path == directory else os.path.relpath(path, directory)


def _numbers(run: RunSummary) -> list[str]:
    step = "-" if run.step is None else _count(run.step)
    if run.total_steps is not None:
        step += f"/{_count(run.total_steps)}"
    return [
        run.status,
        step,
        *("-" if loss is None else f"{loss:#.4g}" for loss in (run.loss, run.val_loss)),
        "-" if run.tokens is None else _count(run.tokens),
        "-" if run.seconds is None else duration(run.seconds),
        "-" if run.time is None else _when(run.time),
    ]


def _count(number: int) -> str:
    """Return a count in four characters or little more: 950, 12.3k, 2.15M, 1.2B."""
    if number < 10_000:
        return str(number)
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return (
                f"{number / size:.3g}{unit}" if number < 999.5 * size else f"{number // size}{unit}"
            )
    raise AssertionError


def _when(seconds: float) -> str:
    """Return a local time; without the year if it is this one."""
    try:
        local = time.localtime(seconds)
    except (OverflowError, ValueError, OSError):
        return "-"
    this_year = local.tm_year == time.localtime().tm_year
    return time.strftime("%m-%d %H:%M" if this_year else "%Y-%m-%d", local)


def _shortened(name: str, most: int) -> str:
    """Return a name with its middle left out: both ends tell runs apart."""
    if len(name) <= most:
        return name
    end = (most - 1) // 2
    return f"{name[: most - 1 - end]}…{name[-end:]}"
