"""metrics.jsonl -> curves for a chart, each with at most some thousand points.

A file of 10^6 lines is read in blocks into columns of numbers. What is drawn of it is the minimum,
the mean and the maximum in each of so many buckets that a screen has no more pixels.
"""

import json
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from minigpt_cli.core.errors import Damaged
from minigpt_cli.core.reading import open_regular
from minigpt_cli.core.run_dir import METRICS

AXES = ("step", "tokens", "seconds")
TRAINED = (
    "loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "memory_bytes",
    "loss_scale",
    "skip_rate",
)
VALIDATED = ("val_loss", "val_perplexity", "val_bits_per_byte")
BUCKETS = 2000  # wider than most charts
_MAX_BYTES = 1 << 30
_BLOCK = 1 << 22  # bytes that are parsed at a time
_MAX_LINE = 1 << 16  # ours have some hundred bytes
_TOO_LARGE = 1e100  # for a number of ours; sums of some stay finite

Column = NDArray[np.float64]
Columns = dict[str, Column]


@dataclass(frozen=True)
class Metrics:
    """The content of metrics.jsonl as columns of float64, ascending by step; NaN: no number.

    Attributes:
        training: ``AXES``, ``TRAINED`` and "time" of each logged step.
        validation: "step", "tokens" and ``VALIDATED`` of each evaluation; its "seconds" are those
            of the logged step before it.
    """

    training: Columns
    validation: Columns


@dataclass(frozen=True)
class Curve:
    """One curve of a chart: float64 [points], NaN where there is no number.

    Attributes:
        mean: the values themselves, if there are few enough.
        low, high: the least and the greatest value of each bucket; None without buckets.
    """

    mean: Column
    low: Column | None = None
    high: Column | None = None


def read_metrics(run: Path) -> Metrics:
    """Read metrics.jsonl of a run; no rows if there is none. Torn or foreign lines are skipped.

    Raises:
        Damaged: it can't be read.
    """
    parts: dict[str, list[Columns]] = {"loss": [], "val_loss": []}
    names = {"loss": (*AXES, *TRAINED, "time"), "val_loss": ("step", "tokens", *VALIDATED)}
    file = run / METRICS
    if file.is_symlink() or file.exists():
        with open_regular(file, Damaged, _MAX_BYTES) as stream:
            for rows in _blocks(stream):
                for key, keys in names.items():
                    chosen = [row for row in rows if key in row]
                    parts[key].append({each: _column(chosen, each) for each in keys})
    training, validation = (
        _ascending({each: _joined([part[each] for part in parts[key]]) for each in keys})
        for key, keys in names.items()
    )
    validation["seconds"] = at_steps(training, "seconds", validation["step"])
    return Metrics(training, validation)


def at_steps(training: Columns, axis: str, steps: Column) -> Column:
    """Return the tokens or seconds at some steps, by interpolation; NaN if they weren't recorded.

    Args:
        training: of ``Metrics``.
        axis: one of ``AXES``.
        steps: [n] of any steps. Beyond the logged ones, it is the first or the last value.
    """
    known = np.isfinite(training[axis])
    if not known.any():
        return np.full(len(steps), np.nan)
    return np.interp(steps, training["step"][known], training[axis][known])


def thinned(columns: Columns, buckets: int = BUCKETS) -> tuple[Columns, dict[str, Curve]]:
    """Reduce columns to what a chart can show.

    Args:
        columns: "step", "tokens", "seconds" and others, [n], ascending by step.
        buckets: of equal width in steps. Up to twice as many rows stay as they are.

    Returns:
        (the axes, [m]; the curves of the other columns, [m]). An axis or a curve without any number
        is left out. A bucket stands where its middle row is.
    """
    step = columns["step"]
    others = {key: column for key, column in columns.items() if key not in (*AXES, "time")}
    if len(step) <= 2 * buckets:
        places, curves = np.arange(len(step)), {key: Curve(each) for key, each in others.items()}
    else:
        number = ((step - step[0]) * (buckets / (step[-1] - step[0] + 1))).astype(np.int64)
        starts = np.flatnonzero(np.diff(number, prepend=-1))
        ends = np.append(starts[1:], len(step))
        places = (starts + ends) // 2
        curves = {key: _bucketed(each, starts) for key, each in others.items()}
    axes = {axis: columns[axis][places] for axis in AXES}
    return (
        {axis: np.fmax.accumulate(each) for axis, each in axes.items() if _has_numbers(each)},
        {key: curve for key, curve in curves.items() if _has_numbers(curve.mean)},
    )


def _bucketed(column: Column, starts: NDArray[np.int64]) -> Curve:
    known = np.isfinite(column)
    counts = np.add.reduceat(known.astype(np.int64), starts)
    sums = np.add.reduceat(np.where(known, column, 0.0), starts)
    mean = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    low, high = np.fmin.reduceat(column, starts), np.fmax.reduceat(column, starts)
    return Curve(mean, low, high)


def _has_numbers(column: Column) -> bool:
    return bool(np.isfinite(column).any())


def _blocks(stream: BinaryIO) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of some megabytes at a time. Longer lines than ours are left out."""
    for block in _lines(stream):
        lines = [line for line in block if len(line) <= _MAX_LINE and line.strip()]
        try:  # all at once takes 0.6 of the time
            rows = json.loads(b"[" + b",".join(lines) + b"]")
        except (ValueError, RecursionError):
            rows = [_row(line) for line in lines]
        yield [row for row in rows if isinstance(row, dict) and _is_step(row.get("step"))]


def _lines(stream: BinaryIO) -> Iterator[list[bytes]]:
    """Yield the lines of some megabytes at a time. A longer line than ours is cut."""
    rest = b""
    while block := stream.read(_BLOCK):
        *lines, rest = (rest + block).split(b"\n")
        rest = rest[: _MAX_LINE + 1]  # it may have no end
        yield lines
    yield [rest]


def _row(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # torn by a power cut
        return None


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 53


def _column(rows: list[dict[str, Any]], key: str) -> Column:
    values = [row.get(key) for row in rows]
    if not {*map(type, values)} <= {float, types.NoneType}:
        values = [_number(value) for value in values]
    column = np.array(values, dtype=np.float64)
    column[~(np.abs(column) < _TOO_LARGE)] = np.nan
    return column


def _number(value: Any) -> float:
    try:
        return float(value) if type(value) in (int, float) else np.nan
    except OverflowError:
        return np.nan


def _joined(parts: list[Column]) -> Column:
    return np.concatenate([np.empty(0), *parts])


def _ascending(columns: Columns) -> Columns:
    """Sort by step. A file of ours is sorted already, but others may have edited it."""
    order = np.argsort(columns["step"], kind="stable")
    return {key: column[order] for key, column in columns.items()}
