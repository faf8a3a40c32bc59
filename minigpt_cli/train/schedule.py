"""The learning rate as a pure function of the update's number."""

import math

from minigpt_cli.recipe import ScheduleSettings


def lr_at(schedule: ScheduleSettings, peak: float, total: int, update: int) -> float:
    """The learning rate of one update.

    Updates are counted from 1: the rate rises linearly from 0 at ``update`` 0, which nothing uses,
    to ``peak`` at update ``warmup_steps``. From there it falls to ``min_lr_ratio * peak`` at update
    ``total`` and stays there:

    - cosine: along half a cosine (Loshchilov and Hutter 2017)
    - linear: along a line
    - wsd: constant, then along a line over the last ``decay_ratio`` of all updates (Hu et al. 2024)
    - step: times ``gamma`` after each milestone, but never below the floor
    - constant: not at all

    Args:
        peak: the highest learning rate.
        total: updates in the whole run.
        update: from 0; beyond ``total`` the rate stays at its last value.
    """
    assert update >= 0
    floor = schedule.min_lr_ratio * peak
    if update < schedule.warmup_steps:
        return peak * update / schedule.warmup_steps

    def fallen(start: float) -> float:
        """The share of the way from ``start`` to the end, in [0, 1]."""
        return min(1.0, max(0.0, (update - start) / max(1e-9, total - start)))

    match schedule.name:
        case "cosine":
            share = 0.5 * (1 + math.cos(math.pi * fallen(schedule.warmup_steps)))
        case "linear":
            share = 1 - fallen(schedule.warmup_steps)
        case "wsd":
            share = 1 - fallen(max(schedule.warmup_steps, total * (1 - schedule.decay_ratio)))
        case "step":
            passed = sum(update > milestone for milestone in schedule.milestones)
            return max(floor, peak * schedule.gamma**passed)
        case "constant":
            return peak
    return floor + share * (peak - floor)
