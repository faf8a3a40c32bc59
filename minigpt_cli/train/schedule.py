"""The learning-rate schedule as a pure function of the update's number."""

import math

from minigpt_cli.recipe import ScheduleSettings


def lr_factor(schedule: ScheduleSettings, total_steps: int, update: int) -> float:
    """Return the factor that scales the peak learning rate at one update.

    Updates are counted from 1. The factor rises linearly from 0 at update 0, which no step uses,
    to 1 at update ``warmup_steps``. From there it falls to ``min_lr_ratio`` at ``total_steps``:

    - cosine: along half a cosine (Loshchilov and Hutter 2017)
    - linear: along a line
    - wsd: constant, then along a line over the last ``decay_ratio`` of all updates (Hu et al. 2024)
    - step: times ``gamma`` after each milestone, but not below ``min_lr_ratio``
    - constant: stays at 1

    Args:
        schedule: the recipe's ``[schedule]``.
        total_steps: the number of updates in the whole run.
        update: the update's number; beyond ``total_steps`` the factor stays at its last value.

    Returns:
        A factor from 0 to 1 (above 1 only if ``gamma`` is).
    """
    assert update >= 0
    floor, warmup = schedule.min_lr_ratio, schedule.warmup_steps
    if update < warmup:
        return update / warmup

    def progress(start: float) -> float:
        """Return how far ``update`` is on the way from ``start`` to the end, from 0 to 1."""
        return min(1.0, max(0.0, (update - start) / max(1e-9, total_steps - start)))

    match schedule.name:
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * progress(warmup)))
        case "linear":
            share = 1 - progress(warmup)
        case "wsd":
            share = 1 - progress(max(warmup, total_steps * (1 - schedule.decay_ratio)))
        case "step":
            passed = sum(update > milestone for milestone in schedule.milestones)
            return max(floor, schedule.gamma**passed)
        case "constant":
            return 1.0
    return floor + share * (1 - floor)
