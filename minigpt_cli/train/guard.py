"""Watches for losses and gradients that are not finite, without waiting for the device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt_cli.errors import Diverged


@dataclass
class Guard:
    """What went wrong so far, on the device: read only when a step is logged or before a save."""

    bad_steps: Tensor  # updates called off that should not have been, int64
    first_bad: Tensor  # the first such step, int64; 0 while there is none
    skipped: Tensor  # updates called off because fp16's gradients overflowed, int64
    skipped_in_a_row: Tensor  # of these, the last ones, int64


# The scale is halved at every skip: after so many of them in a row it is not the scale's fault.
SKIPS_IN_A_ROW = 60


def new_guard(device: torch.device) -> Guard:
    return Guard(*(torch.zeros((), dtype=torch.int64, device=device) for _ in range(4)))


def watch(guard: Guard, step: int, loss: Tensor, grad_norm: Tensor, fp16: bool) -> Tensor:
    """Take note of one step; returns 1.0 where its update must not happen, else 0.0.

    Under fp16 a gradient that overflowed is ordinary: the scaler lowers its scale and the step is
    only skipped. A loss that is not finite never is, nor are overflows without an end.

    Args:
        step: the number of this step, from 1.
        loss, grad_norm: scalars on the device.
    """
    loss_is_bad = ~torch.isfinite(loss)
    call_off = loss_is_bad | ~torch.isfinite(grad_norm)
    bad = call_off
    if fp16:
        guard.skipped_in_a_row.add_(1).mul_(call_off)
        bad = loss_is_bad | (guard.skipped_in_a_row >= SKIPS_IN_A_ROW)
    guard.first_bad += torch.where(bad & (guard.bad_steps == 0), step, 0)
    guard.bad_steps += bad
    guard.skipped += call_off & ~bad
    return call_off.float()


def check(guard: Guard, last_good: str) -> None:
    """Raise ``Diverged`` if a step was bad. Waits for the device.

    Args:
        last_good: where to go on from, for the message.
    """
    bad_steps, first_bad = torch.stack([guard.bad_steps, guard.first_bad]).tolist()
    if bad_steps:
        raise Diverged(
            f"training diverged: loss or gradient was not finite at step {first_bad}; its update "
            f"was not made and nothing after it is saved. {last_good} Try a lower optimizer.lr, "
            "more schedule.warmup_steps, or precision.dtype=fp32"
        )


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
