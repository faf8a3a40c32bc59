"""Detect bad steps on the device, and skip their updates without waiting for the host.

A step is bad if its loss or gradient norm is not finite or, with ``[guard] spike_sigma``, if it
lies more than so many standard deviations above the mean of the last ordinary steps (as in
OLMo-core's SkipStepOptimizer and llm.c's -sl and -sg). guard_report.py reads the state on the host.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt_cli.recipe import GuardSettings

# fp16's loss scale is halved at every overflow. After so many in a row the scale isn't the reason.
MAX_OVERFLOWS_IN_A_ROW = 60
OVERFLOW_WINDOW = 1000  # steps that the rate of overflows is taken over
MAX_RECORDS = 8  # bad steps recorded in full between two reports; later ones are only counted


@dataclass(frozen=True)
class SpikeState:
    """The history that decides whether a step is a spike. All tensors are on the device.

    Attributes:
        sigma: standard deviations above the mean that make a spike.
        rollback_after: bad steps in a row after which the run rolls back.
        recent: (2, window) float64, losses and gradient norms of ordinary steps, newest last.
        count: int64, how many of ``recent`` are filled.
        in_a_row: int64, bad steps since the last ordinary one.
        rollback_at: int64, step at which ``rollback_after`` was reached; 0 if it wasn't.
    """

    sigma: float
    rollback_after: int
    recent: Tensor
    count: Tensor
    in_a_row: Tensor
    rollback_at: Tensor


@dataclass(frozen=True)
class GuardState:
    """What the guard knows of the steps so far. All tensors are on the device.

    Attributes:
        bad: int64, bad steps since the last report was cleared.
        steps: (MAX_RECORDS,) int64, the numbers of the first of them.
        numbers: (MAX_RECORDS, 6) float64, a BadStep's other fields.
        overflows: int64, updates skipped because fp16 gradients overflowed.
        overflows_in_a_row: int64, how many of them came last.
        overflow_ring: (OVERFLOW_WINDOW,) bool, whether step s overflowed, at index s % window.
        spikes: the history of ordinary steps; None without ``spike_sigma``.
    """

    bad: Tensor
    steps: Tensor
    numbers: Tensor
    overflows: Tensor
    overflows_in_a_row: Tensor
    overflow_ring: Tensor
    spikes: SpikeState | None


def new_guard(device: torch.device, settings: GuardSettings | None = None) -> GuardState:
    """Create the guard of a run that begins.

    Args:
        device: where the losses are.
        settings: the recipe's ``[guard]``; by default spikes are not watched.
    """
    settings = settings or GuardSettings()

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    spikes = None
    if settings.spike_sigma is not None:
        spikes = SpikeState(
            sigma=settings.spike_sigma,
            rollback_after=settings.rollback_after,
            recent=zeros(2, settings.spike_window, dtype=torch.float64),
            count=zeros(),
            in_a_row=zeros(),
            rollback_at=zeros(),
        )
    return GuardState(
        bad=zeros(),
        steps=zeros(MAX_RECORDS),
        numbers=zeros(MAX_RECORDS, 6, dtype=torch.float64),
        overflows=zeros(),
        overflows_in_a_row=zeros(),
        overflow_ring=zeros(OVERFLOW_WINDOW, dtype=torch.bool),
        spikes=spikes,
    )


def watch_step(
    guard: GuardState,
    step: int,
    loss: Tensor,
    grad_norm: Tensor,
    *,
    local_loss: Tensor,
    scale: Tensor | None,
) -> Tensor:
    """Record one step and decide whether its update is skipped. Nothing waits for the device.

    An fp16 gradient that overflows is ordinary: the update is skipped and the scaler lowers its
    scale. Non-finite losses are never treated as overflow, nor are 60 or more overflows in a row.

    Args:
        guard: the state, which changes in place.
        step: the number of this step, from 1.
        loss: scalar on the device, the same on all ranks.
        grad_norm: as ``loss``.
        local_loss: this rank's part of the loss, which is only recorded.
        scale: fp16's loss scale in this step, on the device; None without one.

    Returns:
        A float32 scalar on the device: 1.0 if the update must be skipped, else 0.0.
    """
    now = torch.stack([loss, grad_norm]).double()
    finite = torch.isfinite(now)
    missing = now.new_full((), math.nan)
    skip_update = bad = ~finite.all()
    if scale is not None:
        overflow = finite[0] & ~finite[1]
        guard.overflows_in_a_row.add_(1).mul_(overflow)
        guard.overflow_ring[step % OVERFLOW_WINDOW] = overflow
        ordinary_overflow = overflow & (guard.overflows_in_a_row < MAX_OVERFLOWS_IN_A_ROW)
        guard.overflows.add_(ordinary_overflow)
        bad = bad & ~ordinary_overflow
    limits = missing.expand(2)
    if guard.spikes is not None:
        limits = _spike_limits(guard.spikes)
        spike = ((now > limits) & finite).any()
        bad, skip_update = _record_history(
            guard.spikes, step, now, bad | spike, skip_update | spike
        )
    numbers = torch.stack(
        [*now, local_loss.double(), missing if scale is None else scale.double(), *limits]
    )
    here = (_indices(guard.steps) == guard.bad) & bad
    guard.steps.copy_(torch.where(here, step, guard.steps))
    guard.numbers.copy_(torch.where(here[:, None], numbers, guard.numbers))
    guard.bad.add_(bad)
    return skip_update.float()


def _spike_limits(spikes: SpikeState) -> Tensor:
    """Return (2,) float64, the limits of an ordinary loss and gradient norm.

    They are infinite until half of the window is filled.
    """
    recent, count = spikes.recent, spikes.count
    window = recent.shape[1]
    filled = _indices(recent[0]) >= window - count
    mean = recent.sum(dim=1) / count
    squares = torch.where(filled, (recent - mean[:, None]).square(), 0.0)
    std = (squares.sum(dim=1) / (count - 1)).sqrt()
    return torch.where(count >= window // 2, mean + spikes.sigma * std, math.inf)


def _record_history(
    spikes: SpikeState, step: int, now: Tensor, bad: Tensor, skip_update: Tensor
) -> tuple[Tensor, Tensor]:
    """Add one step to the history; return the final (bad, skip_update).

    Once a rollback is due, all later updates are skipped and not counted as bad: so it doesn't
    matter how soon the host looks and rolls back.
    """
    is_due = spikes.rollback_at > 0
    bad = bad & ~is_due
    # Skipped but not bad is an overflow of fp16: neither a bad step nor an ordinary one.
    spikes.in_a_row.add_(bad).mul_(skip_update | is_due)
    becomes_due = bad & (spikes.in_a_row >= spikes.rollback_after)
    spikes.rollback_at.add_(torch.where(becomes_due, step, 0))
    shifted = torch.cat([spikes.recent[:, 1:], now[:, None]], dim=1)
    spikes.recent.copy_(torch.where(skip_update, spikes.recent, shifted))
    spikes.count.add_(~skip_update).clamp_(max=spikes.recent.shape[1])
    return bad, skip_update | is_due


def _indices(row: Tensor) -> Tensor:
    return torch.arange(len(row), device=row.device)
