"""Durations for people."""

import math


def duration(seconds: float) -> str:
    """Return a duration as m:ss or h:mm:ss, from 100 hours on as 4d5h; "?" if it isn't known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d{hours % 24}h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
