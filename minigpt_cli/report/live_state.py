"""What the live view knows about a run: its losses so far, and the last of everything else."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from minigpt_cli.report.curve import Point, thin

_MOST_POINTS = 1024  # the widest curve has fewer columns


@dataclass
class LiveState:
    """Changes as training goes on.

    Attributes:
        total: steps in the whole run.
        clip_norm: the recipe's; 0 if gradients aren't clipped.
        step: the last one that is known to be done.
        values: the last logged step's line of metrics.jsonl; None before the first one.
        seconds_left: an estimate; infinite while nothing is known.
        losses, validation: in the order of their steps. Long lists are thinned.
        best: (step, validation loss) of the lowest one.
        norms: logged steps with a finite gradient norm.
        clipped: those above ``clip_norm``.
        checkpoint: the last one's step.
        saved_at: when it was saved, of ``time.monotonic``; None if another process saved it.
        sample: the last prompt with its completion.
        began: of ``time.monotonic``, when this process began to train.
    """

    total: int
    clip_norm: float
    step: int = 0
    values: dict[str, Any] | None = None
    seconds_left: float = math.inf
    losses: list[Point] = field(default_factory=list)
    validation: list[Point] = field(default_factory=list)
    best: Point | None = None
    norms: int = 0
    clipped: int = 0
    checkpoint: int | None = None
    saved_at: float | None = None
    sample: str | None = None
    began: float = field(default_factory=time.monotonic)

    def restart(
        self, step: int, metrics: Iterable[dict[str, Any]], samples: list[dict[str, Any]]
    ) -> None:
        """Start again from what the run's files hold, after a resume or a rollback.

        Args:
            step: the last one that is done; its checkpoint exists unless it is 0.
            metrics, samples: the lines of metrics.jsonl and samples.jsonl.
        """
        self.step, self.values, self.seconds_left = step, None, math.inf
        self.losses, self.validation, self.best, self.norms, self.clipped = [], [], None, 0, 0
        self.checkpoint, self.saved_at = step or None, None
        for line in metrics:
            if 0 <= line["step"] <= step:
                self.add(line)
        last = samples[-1] if samples else {}
        texts = last.get("prompt"), last.get("completion")
        self.sample = "".join(text for text in texts if isinstance(text, str)) or None

    def note_save(self, step: int) -> None:
        """Note that the checkpoint of ``step`` has just been saved."""
        self.checkpoint, self.saved_at = step, time.monotonic()

    def add(self, line: dict[str, Any]) -> None:
        """Add a line of metrics.jsonl, of a logged step or of an evaluation.

        It may come from a file: what is no finite number is left out.
        """
        loss, val_loss = _number(line.get("loss")), _number(line.get("val_loss"))
        if loss is not None:
            _append(self.losses, (line["step"], loss))
        if val_loss is not None:
            _append(self.validation, (line["step"], val_loss))
            if self.best is None or val_loss < self.best[1]:
                self.best = line["step"], val_loss
        if (norm := _number(line.get("grad_norm"))) is not None:  # else the update was skipped
            self.norms += 1
            self.clipped += norm > self.clip_norm > 0


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None


def _append(points: list[Point], point: Point) -> None:
    points.append(point)
    if len(points) > 2 * _MOST_POINTS:
        points[:] = thin(points, _MOST_POINTS)
