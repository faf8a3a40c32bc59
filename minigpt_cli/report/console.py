"""What a person sees while a run goes on: a live line on a terminal, plain lines elsewhere."""

import contextlib
import math
import time
from typing import Any

import rich.progress
from rich.console import Console
from rich.table import Column

from minigpt_cli.data.progress import Progress

_quiet = False


def be_quiet() -> None:
    """From here on nothing is shown: one of several processes speaks for all."""
    global _quiet
    _quiet = True


def stderr() -> Console:
    """Progress, logs and warnings; standard output is for results."""
    return Console(stderr=True, highlight=False, soft_wrap=True, quiet=_quiet)


def say(message: str, style: str | None = None) -> None:
    """Print a line; a terminal that is gone must not end the work."""
    with contextlib.suppress(OSError):
        stderr().print(message, style=style, markup=False)


def warn(message: str) -> None:
    say(f"warning: {message}", style="yellow")


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


class TokenizingDisplay:
    """Bytes, documents and rate: a live line on a terminal, a line every few seconds elsewhere."""

    SECONDS = 10.0

    def __init__(self) -> None:
        self._console = stderr()
        self._status = self._console.status("")
        self._shown = time.monotonic()

    def __enter__(self) -> "TokenizingDisplay":
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):
            self._status.stop()

    def update(self, progress: Progress) -> None:
        p = progress
        rate = (p.bytes - p.resumed_bytes) / max(p.seconds, 1e-9)
        line = f"{p.phase}: {p.bytes / 1e6:,.1f} MB"
        if p.total_bytes:
            line += f" of {p.total_bytes / 1e6:,.1f} ({p.bytes / p.total_bytes:.0%})"
        line += f", {p.documents:,} documents, {rate / 1e6:.1f} MB/s"
        if p.bad:
            line += f", {p.bad:,} malformed"
        if self._console.is_terminal:
            with contextlib.suppress(OSError):
                self._status.update(line)
        elif time.monotonic() - self._shown > self.SECONDS:
            self._shown = time.monotonic()
            say(line)


class TrainingDisplay:
    """The latest numbers in place on a terminal (wide: with a bar); a line per step elsewhere."""

    def __init__(self, total: int, done: int):
        self._total = total
        self._console = stderr()
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
            self.say(line)

    def say(self, message: str) -> None:
        with contextlib.suppress(OSError):
            self._console.print(message, markup=False)
