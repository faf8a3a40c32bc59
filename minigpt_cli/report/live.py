"""The progress of training: a live line on a terminal, plain lines elsewhere."""

import contextlib
import math
from typing import Any

import rich.progress
from rich.table import Column

from minigpt_cli.core.console import console, log


def duration(seconds: float) -> str:
    """Return a duration as h:mm:ss or m:ss; "?" if it isn't known."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def step_line(values: dict[str, Any], total: int, seconds_left: float) -> str:
    """Return one logged step as a line.

    Args:
        values: the step's line of metrics.jsonl.
        total: steps in the whole run.
        seconds_left: an estimate.
    """
    mfu = values["mfu"]
    return (
        f"step {values['step']}/{total}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
        f"grad norm {values['grad_norm']:.3f}  {values['tokens_per_second']:,.0f} tok/s  "
        f"MFU {'n/a' if mfu is None else f'{mfu:.1%}'}  left {duration(seconds_left)}"
    )


class TrainingDisplay:
    """Shows the last logged step in place on a terminal, and as a line per step elsewhere.

    It uses the console of core/console.py, so that log lines appear above it.
    """

    def __init__(self, total: int, done: int):
        """Create a display that isn't shown yet.

        Args:
            total: steps in the whole run.
            done: steps done so far.
        """
        self._total = total
        self._console = console()
        self._live = self._console.is_terminal
        # A column of its own wraps on a narrow terminal; by default rich cuts off the time left.
        text = rich.progress.TextColumn("{task.fields[line]}", table_column=Column())
        wide = self._console.width >= 130
        self._progress = rich.progress.Progress(
            *([text, rich.progress.BarColumn(bar_width=20)] if wide else [text]),
            console=self._console,
            disable=not self._live,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total, completed=done, line="")

    def __enter__(self) -> "TrainingDisplay":
        """Show the display."""
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the display; a terminal that is gone is no error."""
        with contextlib.suppress(OSError):
            self._progress.stop()

    def step(self, values: dict[str, Any], seconds_left: float) -> None:
        """Show a logged step.

        Args:
            values: the step's line of metrics.jsonl.
            seconds_left: an estimate.
        """
        line = step_line(values, self._total, seconds_left)
        if self._live:
            with contextlib.suppress(OSError):
                self._progress.update(self._task, completed=values["step"], line=line)
        else:
            log(line)
