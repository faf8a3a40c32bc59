"""The progress of training: a live line on a terminal, plain lines elsewhere."""

import contextlib
import math
from typing import Any

import rich.progress
from rich.table import Column

from minigpt_cli.core.console import console, log


def duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def step_line(values: dict[str, Any], total: int, seconds_left: float) -> str:
    """One logged step in words."""
    mfu = values["mfu"]
    return (
        f"step {values['step']}/{total}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
        f"grad norm {values['grad_norm']:.3f}  {values['tokens_per_second']:,.0f} tok/s  "
        f"MFU {'n/a' if mfu is None else f'{mfu:.1%}'}  left {duration(seconds_left)}"
    )


class TrainingDisplay:
    """The latest numbers in place on a terminal (wide: with a bar); a line per step elsewhere."""

    def __init__(self, total: int, done: int):
        self._total = total
        self._console = console()
        self._live = self._console.is_terminal
        # On a narrow terminal the text takes two lines: by default its end, the time left, is cut.
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
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._progress.stop()

    def step(self, values: dict[str, Any], seconds_left: float) -> None:
        line = step_line(values, self._total, seconds_left)
        if self._live:
            with contextlib.suppress(OSError):
                self._progress.update(self._task, completed=values["step"], line=line)
        else:
            log(line)
