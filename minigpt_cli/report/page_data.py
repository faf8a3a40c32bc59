"""What a report shows, as text for its tables and as JSON for its charts."""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_cli.core.console import printable
from minigpt_cli.core.duration import duration
from minigpt_cli.core.memory import format_size
from minigpt_cli.recipe.tables import leaves, to_tables
from minigpt_cli.report.curves import AXES, Column, Columns, Curve, at_steps, thinned
from minigpt_cli.report.numbers import RunNumbers
from minigpt_cli.report.run_contents import RunContents

Rows = list[tuple[str, list[str]]]  # (what, a text for each run)

_ESCAPED = {ord(each): f"\\u{ord(each):04x}" for each in "<>&\u2028\u2029"}


def chart_json(runs: list[RunContents], summaries: list[RunNumbers]) -> str:
    """Return the data of all charts as JSON, safe inside an HTML element.

    It is ``{"runs": [...]}``; each has name, training and validation (axes and curves of numbers,
    null for no number), marks (incidents and checkpoints, on each axis), clip_norm, p90 and p95.
    """
    found = [_chart_data(run, each) for run, each in zip(runs, summaries, strict=True)]
    text = json.dumps({"runs": found}, allow_nan=False, separators=(",", ":"))
    return text.translate(_ESCAPED)


def facts(run: RunContents, numbers: RunNumbers) -> list[tuple[str, str]]:
    """Return the (name, value) pairs that begin a report."""
    total = "" if numbers.total_steps is None else f" of {numbers.total_steps:,}"
    best = numbers.best_val_loss
    bits, perplexity = numbers.val_bits_per_byte, numbers.val_perplexity
    pairs = [
        ("step", "" if numbers.step is None else f"{numbers.step:,}{total}"),
        ("tokens", _count(numbers.tokens)),
        ("parameters saved", _count(numbers.parameters)),
        ("loss (mean of the last 20 logged)", _decimal(numbers.loss)),
        ("validation loss", _decimal(numbers.val_loss)),
        ("best validation loss", "" if best is None else f"{best:.4f} at {numbers.best_step:,}"),
        ("perplexity", "" if perplexity is None else f"{perplexity:,.2f}"),
        ("bits per byte", _decimal(bits)),
        ("training time", "" if numbers.seconds is None else duration(numbers.seconds)),
        ("tokens/s (median)", _count(numbers.tokens_per_second)),
        ("MFU (median)", "" if numbers.mfu is None else f"{numbers.mfu:.1%}"),
        ("peak memory", "" if numbers.memory_bytes is None else format_size(numbers.memory_bytes)),
        ("last step logged", "" if numbers.time is None else _date(numbers.time)),
        ("losses that were no number", f"{numbers.nonfinite:,}" if numbers.nonfinite else ""),
    ]
    return [(name, value) for name, value in pairs if value]


def fact_table(found: list[list[tuple[str, str]]]) -> Rows:
    """Return the facts of several runs side by side, each fact that any run has."""
    names = max(found, key=len, default=[])
    wanted = dict.fromkeys([*(name for name, _ in names), *(n for each in found for n, _ in each)])
    return [(name, [dict(each).get(name, "") for each in found]) for name in wanted]


def settings(run: RunContents) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Return a run's recipe: for each section (key, value, origin) of its settings."""
    if run.recipe is None:
        return []
    sections: dict[str, list[tuple[str, str, str]]] = {}
    for name, value in leaves(to_tables(run.recipe)).items():
        section, _, key = name.rpartition(".")
        if not section:
            continue  # a whole section that is not set
        origin = run.recipe.origin.get(name, "default")
        sections.setdefault(section, []).append((key, _setting(value), origin))
    return list(sections.items())


def recipe_differences(runs: list[RunContents]) -> Rows:
    """Return the settings that differ between runs."""
    tables = [None if run.recipe is None else leaves(to_tables(run.recipe)) for run in runs]
    names = dict.fromkeys(name for table in tables if table for name in table)
    found: Rows = []
    for name in names:
        values = ["" if table is None else _setting(table.get(name)) for table in tables]
        if len({value for value, table in zip(values, tables, strict=True) if table}) > 1:
            found.append((name, values))
    return found


def environments(runs: list[RunContents]) -> Rows:
    """Return the runs' software and hardware side by side."""
    names = dict.fromkeys(name for run in runs for name in run.environment)
    return [(name, [_setting(run.environment.get(name)) for run in runs]) for name in names]


def datasets(runs: list[RunContents]) -> Rows:
    """Return the runs' data side by side."""
    found = [_dataset(run) for run in runs]
    names = dict.fromkeys(name for each in found for name in each)
    return [(name, [each.get(name, "") for each in found]) for name in names]


def checkpoint_rows(run: RunContents) -> list[list[str]]:
    """Return step, validation loss, size, time and directory of each checkpoint, newest first."""
    rows = []
    for saved in reversed(run.checkpoints):
        if saved.manifest is None:
            cells = ["", "damaged", saved.problem]
        else:
            size = sum(entry["bytes"] for entry in saved.manifest.files.values())
            cells = [_decimal(saved.manifest.val_loss), format_size(size), _date(saved.saved)]
        rows.append([f"{saved.step:,}", *cells, saved.name])
    return rows


def _dataset(run: RunContents) -> dict[str, str]:
    if run.recipe is None:
        return {}
    path, manifest = run.recipe.data_path, run.dataset
    if manifest is None:
        where = "" if Path(path).is_absolute() else f" in {Path.cwd()}"
        return {"path": path, "state": f"not here: there is no such dataset{where}"}
    known = run.fingerprints.get("content")
    is_same = "not known: there is no checkpoint" if known is None else "yes"
    if known is not None and known != manifest.fingerprint:
        is_same = "no: it has changed since, or is another one"
    rows = {
        "path": path,
        "the one that was trained on": is_same,
        "vocabulary": f"{manifest.vocab_size:,}",
        "source": json.dumps(manifest.source, ensure_ascii=False),
        "lines or records left out": f"{manifest.bad_lines:,}",
        "made with": f"minigpt {manifest.minigpt_version}",
        "fingerprint": manifest.fingerprint[:16],
    }
    for name, split in manifest.splits.items():
        rows[name] = (
            f"{split.tokens:,} tokens, {split.documents:,} documents, {format_size(split.bytes)}"
        )
    tokens = run.metrics.training["tokens"]
    if np.isfinite(tokens).any() and manifest.splits["train"].tokens:
        epochs = np.nanmax(tokens) / manifest.splits["train"].tokens
        rows["epochs so far"] = f"{epochs:.2f}"
    return rows


def _chart_data(run: RunContents, numbers: RunNumbers) -> dict[str, Any]:
    clip = numbers.clip
    return {
        "name": printable(run.name),
        "training": _table(run.metrics.training),
        "validation": _table(run.metrics.validation),
        "marks": _marks(run),
        "clip_norm": None if clip is None else clip.clip_norm or None,
        "p90": None if clip is None else _rounded(clip.p90),
        "p95": None if clip is None else _rounded(clip.p95),
    }


def _table(columns: Columns) -> dict[str, Any]:
    axes, curves = thinned(columns)
    return {
        "axes": {name: [_rounded(x, 10) for x in axis.tolist()] for name, axis in axes.items()},
        "curves": {name: _curve(curve) for name, curve in curves.items()},
    }


def _curve(curve: Curve) -> dict[str, Any]:
    parts: dict[str, Column | None] = {"mean": curve.mean, "low": curve.low, "high": curve.high}
    return {
        name: [_rounded(value) for value in part.tolist()]
        for name, part in parts.items()
        if part is not None
    }


def _marks(run: RunContents) -> list[dict[str, Any]]:
    """Return incidents and checkpoints with their places on each axis."""
    marks = [
        (each.kind, step, each.reason or each.kind)
        for each in run.incidents
        for step in (each.steps if each.kind != "rollback" else (each.step,))
    ]
    marks += [("checkpoint", saved.step, saved.name) for saved in run.checkpoints]
    steps = np.array([step for _, step, _ in marks], dtype=np.float64)
    training = run.metrics.training
    if not training["step"].size:
        return []
    places = {axis: _places(training, axis, steps) for axis in AXES}
    return [
        {"kind": kind, "text": printable(text)[:300]}
        | {axis: found[number] for axis, found in places.items()}
        for number, (kind, _, text) in enumerate(marks)
    ]


def _places(training: Columns, axis: str, steps: Column) -> list[float | int | None]:
    places = steps if axis == "step" else at_steps(training, axis, steps)
    return [_rounded(place, 10) for place in places.tolist()]


def _rounded(value: float, digits: int = 6) -> float | int | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1 << 53 else short


def _setting(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _date(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):  # of a file that someone edited
        return ""
