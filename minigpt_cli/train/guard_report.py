"""Read the guard on the host: report bad steps, save its state and restore it."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from minigpt_cli.core.errors import Diverged
from minigpt_cli.core.faq import faq
from minigpt_cli.train.guard import MAX_RECORDS, OVERFLOW_WINDOW, GuardState

# An overflow rate above this is warned about, but only after more overflows than a new run needs to
# find its scale: 10 take it from 2^16 to 2^6.
OVERFLOW_RATE_LIMIT, ORDINARY_OVERFLOWS = 0.05, 10


@dataclass(frozen=True)
class BadStep:
    """One bad step. A number that doesn't exist is NaN.

    Attributes:
        step: its number, from 1.
        loss: over all ranks.
        grad_norm: of the whole gradient.
        local_loss: this rank's part of the loss.
        loss_scale: fp16's.
        loss_limit: a loss above it is a spike.
        grad_norm_limit: a gradient norm above it is a spike.
    """

    step: int
    loss: float
    grad_norm: float
    local_loss: float
    loss_scale: float
    loss_limit: float
    grad_norm_limit: float

    @property
    def is_finite(self) -> bool:
        """Return whether loss and gradient norm are finite."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class GuardReport:
    """The bad steps since the last report was cleared.

    Attributes:
        bad: how many there are.
        steps: the first ``MAX_RECORDS`` of them.
        rollback_at: step at which too many in a row were reached; 0 if it wasn't.
    """

    bad: int
    steps: tuple[BadStep, ...]
    rollback_at: int


def read_guard(guard: GuardState) -> GuardReport:
    """Return the bad steps since the last ``clear_report``. Waits for the device."""
    rollback_at = torch.zeros_like(guard.bad) if guard.spikes is None else guard.spikes.rollback_at
    counts = torch.stack([guard.bad, rollback_at])
    flat = torch.cat([counts.double(), guard.steps.double(), guard.numbers.flatten()]).tolist()
    bad, at = int(flat[0]), int(flat[1])
    steps, numbers = flat[2 : 2 + MAX_RECORDS], flat[2 + MAX_RECORDS :]
    records = tuple(
        BadStep(int(step), *numbers[6 * row : 6 * row + 6])
        for row, step in enumerate(steps[: min(bad, MAX_RECORDS)])
    )
    return GuardReport(bad, records, at)


def clear_report(guard: GuardState) -> None:
    """Forget the bad steps that have been reported."""
    guard.bad.zero_()


def divergence(report: GuardReport, last_good: str) -> Diverged:
    """Return the error that ends a run after a bad step.

    Args:
        report: with at least one bad step.
        last_good: a sentence about the last good checkpoint.
    """
    return Diverged(
        f"training diverged: loss or gradient was not finite at step {report.steps[0].step}; its "
        f"update was skipped and nothing after it is saved. {last_good} Try a lower optimizer.lr, "
        "more schedule.warmup_steps, or precision.dtype=fp32; guard.spike_sigma=6 skips such steps "
        f"{faq('loss-is-nan')}"
    )


def overflow_rate(guard: GuardState, step: int) -> float:
    """Return the share of the last 1,000 steps whose gradients overflowed. Waits for the device."""
    return float(guard.overflow_ring.sum().item()) / min(step, OVERFLOW_WINDOW)


def overflow_warning(rate: float, step: int) -> str | None:
    """Return a warning if too many of the last steps overflowed.

    Args:
        rate: of ``overflow_rate``.
        step: the number of steps so far.
    """
    steps = min(step, OVERFLOW_WINDOW)
    overflows = round(rate * steps)
    if rate <= OVERFLOW_RATE_LIMIT or overflows <= ORDINARY_OVERFLOWS:
        return None
    return (
        f"fp16 skipped {overflows} of the last {steps:,} steps ({rate:.1%}) because gradients "
        "overflowed: set precision.dtype to bf16 or fp32, or lower optimizer.lr "
        f"{faq('loss-is-nan')}"
    )


def guard_to_json(guard: GuardState, step: int) -> dict[str, Any]:
    """Return the state that later decisions depend on, for state.json. Waits for the device.

    Args:
        guard: the state after ``step``.
        step: the number of steps so far.

    Returns:
        skips: the steps among the last 1,000 that overflowed; losses, grad_norms: of the last
        ordinary steps; spikes_in_a_row. Keys without content are left out.
    """
    saved: dict[str, Any] = {}
    ring = guard.overflow_ring.tolist()
    if any(ring):
        last = range(max(1, step - OVERFLOW_WINDOW + 1), step + 1)
        saved["skips"] = [n for n in last if ring[n % OVERFLOW_WINDOW]]
    if guard.spikes is not None:
        losses, grad_norms = guard.spikes.recent.tolist()
        start = len(losses) - int(guard.spikes.count.item())
        saved["losses"], saved["grad_norms"] = losses[start:], grad_norms[start:]
        saved["spikes_in_a_row"] = int(guard.spikes.in_a_row.item())
    return saved


def restore_guard(guard: GuardState, saved: dict[str, Any], step: int, overflows: int) -> None:
    """Restore the result of ``guard_to_json``; reset everything else.

    Args:
        guard: the state, which changes in place.
        saved: of ``guard_to_json``, perhaps with other ``[guard]`` settings.
        step: the step it was saved at.
        overflows: fp16 updates skipped up to then.
    """
    clear_report(guard)
    guard.overflows.fill_(overflows)
    overflowed = set(saved.get("skips", []))
    ring = torch.zeros(OVERFLOW_WINDOW, dtype=torch.bool)
    ring[[n % OVERFLOW_WINDOW for n in overflowed]] = True
    guard.overflow_ring.copy_(ring)
    in_a_row = next(n for n in range(step + 2) if step - n not in overflowed)
    guard.overflows_in_a_row.fill_(in_a_row)
    if (spikes := guard.spikes) is not None:
        window = spikes.recent.shape[1]
        pairs = list(zip(saved.get("losses", []), saved.get("grad_norms", []), strict=True))
        pairs = pairs[-window:]
        recent = torch.zeros(2, window, dtype=torch.float64)
        if pairs:
            recent[:, -len(pairs) :] = torch.tensor(pairs, dtype=torch.float64).T
        spikes.recent.copy_(recent)
        spikes.count.fill_(len(pairs))
        spikes.in_a_row.fill_(saved.get("spikes_in_a_row", 0))
        spikes.rollback_at.zero_()
