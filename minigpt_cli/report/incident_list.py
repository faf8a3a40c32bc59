"""What a run's incidents/ say, in short: when, where and why updates were skipped."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import Damaged
from minigpt_cli.core.reading import read_json
from minigpt_cli.core.run_dir import INCIDENTS

MAX_INCIDENTS = 1000  # that are read; a run with more has one problem, not a thousand
_MAX_TEXTS = 4  # sequences of a batch that are quoted
_NAME = re.compile(r"step-(\d{8,15})(?:-offset-\d+)?-(spike|nonfinite|rollback)\.json")


@dataclass(frozen=True)
class Incident:
    """One file of incidents/.

    Attributes:
        kind: spike, nonfinite or rollback.
        step: the first bad step; of a rollback, the last one.
        steps: all bad steps that are recorded; of a rollback, the two that it went between.
        reason: a phrase.
        time: as in the file; empty if it isn't known.
        file: its name.
        batch: the place and the beginning of some sequences of the step.
    """

    kind: str
    step: int
    steps: tuple[int, ...]
    reason: str
    time: str
    file: str
    batch: tuple[str, ...]


def list_incidents(run: Path) -> tuple[list[Incident], list[str]]:
    """Read the incidents of a run.

    Returns:
        (the first ``MAX_INCIDENTS`` by step; a line for each file that can't be read, and for those
        that are left out).
    """
    try:
        names = sorted(path.name for path in (run / INCIDENTS).iterdir())
    except OSError:
        return [], []
    found = [match for name in names if (match := _NAME.fullmatch(name))]
    found.sort(key=lambda match: (int(match[1]), match[2] == "rollback"))
    incidents, problems = [], []
    for match in found[:MAX_INCIDENTS]:
        try:
            content = read_json(run / INCIDENTS / match[0], Damaged)
            incidents.append(_incident(match, content))
        except Damaged as error:
            problems.append(str(error))
    if len(found) > MAX_INCIDENTS:
        left = len(found) - MAX_INCIDENTS
        problems.append(f"{run / INCIDENTS}: {left:,} more incidents are not shown")
    return incidents, problems


def _incident(match: re.Match[str], content: dict[str, Any]) -> Incident:
    step, kind = int(match[1]), match[2]
    steps, reason = (
        _rollback(step, content) if kind == "rollback" else _bad_steps(step, content, kind)
    )
    return Incident(
        kind=kind,
        step=step,
        steps=steps,
        reason=reason,
        time=content["time"] if isinstance(content.get("time"), str) else "",
        file=f"{INCIDENTS}/{match[0]}",
        batch=tuple(_texts(content)),
    )


def _rollback(step: int, content: dict[str, Any]) -> tuple[tuple[int, ...], str]:
    to_step = content.get("to_step")
    if type(to_step) is not int:
        return (step,), "rolled back"
    return (to_step, step), f"rolled back to step {to_step:,}; the data in between is skipped"


def _bad_steps(step: int, content: dict[str, Any], kind: str) -> tuple[tuple[int, ...], str]:
    parts = []
    for key, name in (("loss", "loss"), ("grad_norm", "gradient norm")):
        value, limit = _number(content.get(key)), _number(content.get(f"{key}_limit"))
        if value is None:
            continue
        if kind == "nonfinite":
            parts.append(f"{name} {value:.4g}")
        elif limit is not None and value > limit:
            parts.append(f"{name} {value:.4g} is above {limit:.4g}")
    others = content.get("others")
    records = others if isinstance(others, list) else []
    steps = [each.get("step") for each in records if isinstance(each, dict)]
    more = sorted({each for each in steps if type(each) is int})
    if (bad := content.get("bad_steps")) and type(bad) is int and bad > 1:
        parts.append(f"{bad:,} steps were skipped")
    return (step, *more), ", ".join(parts)


def _number(value: Any) -> float | None:
    """Return a number, also of "nan", "inf" and "-inf"; None for anything else."""
    is_number = type(value) in (int, float) or value in ("nan", "inf", "-inf")
    try:
        return float(value) if is_number else None
    except OverflowError:
        return None


def _texts(content: dict[str, Any]) -> Iterator[str]:
    windows = content.get("windows")
    for window in (windows if isinstance(windows, list) else [])[:_MAX_TEXTS]:
        if not isinstance(window, dict):
            continue
        if "shard" in window:
            place = f"{window['shard']!s:.80}, offset {window.get('offset')!s:.20}"
            yield f"{place}: {window.get('text', '')!s:.200}"
        elif isinstance(examples := window.get("examples"), list):
            for each in examples[:1]:
                if isinstance(each, dict):
                    number = f"example {each.get('example')!s:.20}"
                    yield f"{number}: {each.get('text', '')!s:.200}"
