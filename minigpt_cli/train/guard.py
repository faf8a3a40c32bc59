"""Watches losses and gradients on the device: calls bad updates off, and remembers what the host
needs to know until it looks.

Bad is what is not finite and, where ``[guard] spike_sigma`` is set, what rises above the mean of
the last ordinary steps by more than so many standard deviations (as OLMo-core's SkipStepOptimizer
and llm.c's -sl and -sg do).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt_cli.core.errors import Diverged
from minigpt_cli.recipe import GuardSettings

# The scale is halved at every skip: after so many of them in a row it is not the scale's fault.
SKIPS_IN_A_ROW = 60
SKIP_WINDOW = 1000  # steps that fp16's skip rate is taken over
# A skip rate above this is warned about, once there are more skips than a new run needs to find its
# scale: 10 take it from 2^16 to 2^6.
SKIP_ALARM, ORDINARY_SKIPS = 0.05, 10
RECORDS = 8  # bad steps remembered in full between two looks of the host; the rest are counted


@dataclass(frozen=True)
class Spikes:
    """What decides whether a step is a spike; only where ``spike_sigma`` is set."""

    sigma: float
    rollback_after: int
    recent: Tensor  # (2, window) float64: losses, gradient norms; newest last, 0 where none yet
    ordinary: Tensor  # how many of them there are, int64
    in_a_row: Tensor  # bad steps since the last ordinary one, int64
    rollback_at: Tensor  # the step that was the last one too many, int64; 0 while there is none


@dataclass
class Guard:
    """What went wrong so far, on the device: read only when a step is logged, or before an
    evaluation or a save."""

    bad: Tensor  # updates called off since the last ``forget``, fp16's skips not counted; int64
    steps: Tensor  # (RECORDS,) int64: the first of them
    numbers: Tensor  # (RECORDS, 6) float64: what a BadStep holds beside its number
    skipped: Tensor  # updates called off because fp16's gradients overflowed, int64
    skipped_in_a_row: Tensor  # of these, the last ones, int64
    skips: Tensor  # (SKIP_WINDOW,) bool: whether the gradient of step s overflowed, at s % window
    spikes: Spikes | None
    alarmed: bool = False  # on the host: the skip rate has been warned about, and is still high


@dataclass(frozen=True)
class BadStep:
    """One step whose update was called off. NaN stands for what there is none of."""

    step: int
    loss: float
    grad_norm: float
    local_loss: float  # this process's share of the loss
    loss_scale: float  # fp16's
    loss_limit: float  # above it, a loss is a spike
    grad_norm_limit: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class Seen:
    """What the host finds when it looks."""

    bad: int
    steps: tuple[BadStep, ...]  # the first of them
    rollback_at: int  # the step at which bad steps became too many in a row; 0: they did not


def new_guard(device: torch.device, settings: GuardSettings | None = None) -> Guard:
    settings = settings or GuardSettings()

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    spikes = None
    if settings.spike_sigma is not None:
        recent = zeros(2, settings.spike_window, dtype=torch.float64)
        spikes = Spikes(
            settings.spike_sigma, settings.rollback_after, recent, zeros(), zeros(), zeros()
        )
    return Guard(
        bad=zeros(),
        steps=zeros(RECORDS),
        numbers=zeros(RECORDS, 6, dtype=torch.float64),
        skipped=zeros(),
        skipped_in_a_row=zeros(),
        skips=zeros(SKIP_WINDOW, dtype=torch.bool),
        spikes=spikes,
    )


# --- on the device -------------------------------------------------------------------------------


def watch(
    guard: Guard,
    step: int,
    loss: Tensor,
    grad_norm: Tensor,
    *,
    local_loss: Tensor,
    scale: Tensor | None,
) -> Tensor:
    """Take note of one step; returns 1.0 where its update must not happen, else 0.0 (float32).

    Under fp16 a gradient that overflowed is ordinary: the scaler lowers its scale and the step is
    only skipped. A loss that is not finite never is, nor are overflows without an end.

    Args:
        step: the number of this step, from 1.
        loss, grad_norm: scalars on the device, the same on all ranks.
        local_loss: this rank's own share of the loss; only remembered.
        scale: fp16's loss scale in this step, on the device; None without one.
    """
    now = torch.stack([loss, grad_norm]).double()
    finite = torch.isfinite(now)
    nothing = now.new_full((), math.nan)
    skip_update = bad = ~finite.all()
    if scale is not None:
        overflow = finite[0] & ~finite[1]
        guard.skipped_in_a_row.add_(1).mul_(overflow)
        guard.skips[step % SKIP_WINDOW] = overflow
        skip = overflow & (guard.skipped_in_a_row < SKIPS_IN_A_ROW)
        guard.skipped += skip
        bad = bad & ~skip
    limits = nothing.expand(2)
    if guard.spikes is not None:
        limits = _limits(guard.spikes)
        spike = ((now > limits) & finite).any()
        bad, skip_update = _count(guard.spikes, step, now, bad | spike, skip_update | spike)
    numbers = torch.stack(
        [*now, local_loss.double(), nothing if scale is None else scale.double(), *limits]
    )
    here = (_places(guard.steps) == guard.bad) & bad
    guard.steps.copy_(torch.where(here, step, guard.steps))
    guard.numbers.copy_(torch.where(here[:, None], numbers, guard.numbers))
    guard.bad += bad
    return skip_update.float()


def _limits(spikes: Spikes) -> Tensor:
    """(2,) float64: above them a loss, or a gradient norm, is a spike; infinite until the buffers
    are half full."""
    recent, ordinary = spikes.recent, spikes.ordinary
    window = recent.shape[1]
    there = _places(recent[0]) >= window - ordinary
    mean = recent.sum(dim=1) / ordinary
    squares = torch.where(there, (recent - mean[:, None]).square(), 0.0)
    std = (squares.sum(dim=1) / (ordinary - 1)).sqrt()
    return torch.where(ordinary >= window // 2, mean + spikes.sigma * std, math.inf)


def _count(
    spikes: Spikes, step: int, now: Tensor, bad: Tensor, skip_update: Tensor
) -> tuple[Tensor, Tensor]:
    """Put one step into the history; returns (is bad, is called off).

    Once there were too many bad steps in a row, all that follows is called off and not counted
    as bad: so it doesn't matter how soon the host looks, and rolls back.
    """
    over = spikes.rollback_at > 0
    bad = bad & ~over
    # Called off but not bad is an overflow of fp16: neither a bad step nor an ordinary one.
    spikes.in_a_row.add_(bad).mul_(skip_update | over)
    too_many = bad & (spikes.in_a_row >= spikes.rollback_after)
    spikes.rollback_at.add_(torch.where(too_many, step, 0))
    shifted = torch.cat([spikes.recent[:, 1:], now[:, None]], dim=1)
    spikes.recent.copy_(torch.where(skip_update, spikes.recent, shifted))
    spikes.ordinary.add_(~skip_update).clamp_(max=spikes.recent.shape[1])
    return bad, skip_update | over


def _places(row: Tensor) -> Tensor:
    return torch.arange(len(row), device=row.device)


# --- on the host ---------------------------------------------------------------------------------


def look(guard: Guard) -> Seen:
    """What was bad since the last ``forget``. Waits for the device."""
    rollback_at = torch.zeros_like(guard.bad) if guard.spikes is None else guard.spikes.rollback_at
    counts = torch.stack([guard.bad, rollback_at])
    flat = torch.cat([counts.double(), guard.steps.double(), guard.numbers.flatten()]).tolist()
    bad, at, steps, numbers = int(flat[0]), int(flat[1]), flat[2 : 2 + RECORDS], flat[2 + RECORDS :]
    return Seen(
        bad,
        tuple(
            BadStep(int(step), *numbers[6 * row : 6 * row + 6])
            for row, step in enumerate(steps[: min(bad, RECORDS)])
        ),
        at,
    )


def forget(guard: Guard) -> None:
    """What ``look`` found has been reported."""
    guard.bad.zero_()


def diverged(seen: Seen, last_good: str) -> Diverged:
    """The end of a run that spikes don't roll back.

    Args:
        last_good: where to go on from, for the message.
    """
    return Diverged(
        f"training diverged: loss or gradient was not finite at step {seen.steps[0].step}; its "
        f"update was not made and nothing after it is saved. {last_good} Try a lower optimizer.lr, "
        "more schedule.warmup_steps, or precision.dtype=fp32; guard.spike_sigma=6 skips such steps"
    )


def check(guard: Guard, last_good: str) -> None:
    """Raise ``Diverged`` if a step was bad and nothing can be done about it. Waits for the device.

    Args:
        last_good: where to go on from, for the message.
    """
    seen = look(guard)
    if guard.spikes is None and seen.bad:
        raise diverged(seen, last_good)
    assert not seen.rollback_at, "the loop rolls back before anything else"


def are_finite(tensors: list[Tensor]) -> bool:
    """Whether all weights and moments are finite: a finite gradient can make them overflow still,
    by a learning rate or a square. Waits for the device.

    Args:
        tensors: this rank's part of each.
    """
    # Both are NaN where one element is. Of a small tensor a rank may hold nothing.
    extremes = [torch.stack(torch.aminmax(t)).double() for t in tensors if t.numel()]
    return not extremes or bool(torch.cat(extremes).isfinite().all())


def skip_rate(guard: Guard, step: int) -> float:
    """The share of the last 1,000 steps whose gradients overflowed. Waits for the device."""
    return float(guard.skips.sum().item()) / min(step, SKIP_WINDOW)


def warn_about_skips(guard: Guard, rate: float, step: int) -> str | None:
    """A warning when the skip rate has become too high; not again before it was ordinary."""
    skips = round(rate * min(step, SKIP_WINDOW))
    was, guard.alarmed = guard.alarmed, rate > SKIP_ALARM and skips > ORDINARY_SKIPS
    if was or not guard.alarmed:
        return None
    return (
        f"fp16 skipped {skips} of the last {min(step, SKIP_WINDOW):,} steps ({rate:.1%}) because "
        "gradients overflowed: precision.dtype=bf16 or fp32, or a lower optimizer.lr"
    )


def saved(guard: Guard, step: int) -> dict[str, Any]:
    """What the decisions after ``step`` depend on, for state.json; empty where nothing is used."""
    kept: dict[str, Any] = {}
    ring = guard.skips.tolist()
    if any(ring):
        last = range(max(1, step - SKIP_WINDOW + 1), step + 1)
        kept["skips"] = [n for n in last if ring[n % SKIP_WINDOW]]
    if guard.spikes is not None:
        losses, grad_norms = guard.spikes.recent.tolist()
        start = len(losses) - int(guard.spikes.ordinary.item())
        kept["losses"], kept["grad_norms"] = losses[start:], grad_norms[start:]
        kept["spikes_in_a_row"] = int(guard.spikes.in_a_row.item())
    return kept


def restore(guard: Guard, kept: dict[str, Any], step: int, skipped: int) -> None:
    """Put back what ``saved`` returned at ``step``; everything else starts anew.

    Args:
        skipped: fp16 updates skipped up to then.
    """
    forget(guard)
    guard.skipped.fill_(skipped)
    skips = set(kept.get("skips", []))
    ring = torch.zeros(SKIP_WINDOW, dtype=torch.bool)
    ring[[n % SKIP_WINDOW for n in skips]] = True
    guard.skips.copy_(ring)
    in_a_row = next(n for n in range(step + 2) if step - n not in skips)
    guard.skipped_in_a_row.fill_(in_a_row)
    if (spikes := guard.spikes) is not None:
        window = spikes.recent.shape[1]
        pairs = list(zip(kept.get("losses", []), kept.get("grad_norms", []), strict=True))[-window:]
        recent = torch.zeros(2, window, dtype=torch.float64)
        if pairs:
            recent[:, -len(pairs) :] = torch.tensor(pairs, dtype=torch.float64).T
        spikes.recent.copy_(recent)
        spikes.ordinary.fill_(len(pairs))
        spikes.in_a_row.fill_(kept.get("spikes_in_a_row", 0))
        spikes.rollback_at.zero_()


def warn_about_first_loss(loss: float, vocab_size: int) -> str | None:
    """A warning if the loss before any update is far from a uniform guess's, ln(vocabulary)."""
    expected = math.log(vocab_size)
    if math.isfinite(loss) and abs(loss - expected) <= 0.1 * expected + 0.5:
        return None
    return (
        f"the loss before any update is {loss:.3f}; a new model's should be near "
        f"ln({vocab_size}) = {expected:.3f}. Look at: model.initializer_range (too large?), "
        "the dataset's tokenizer, and how targets are shifted"
    )
