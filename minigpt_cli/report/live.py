"""The progress of training: a live view on a terminal, plain lines elsewhere."""

import threading
import time
from typing import TYPE_CHECKING, Any

from minigpt_cli.core.console import console, log
from minigpt_cli.report.live_layout import duration, history_line, view_lines
from minigpt_cli.report.live_state import LiveState

if TYPE_CHECKING:
    from rich.text import Text

    from minigpt_cli.report.panel import Panel


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
    """Shows a run's progress.

    On a terminal a view stays at the bottom: curve, bar, numbers, last sample. Each logged step is
    also a line above it, which remains. Elsewhere there are only these lines. Ranks that print
    nothing (``set_quiet``) show nothing.

    It uses the console of core/console.py, so that log lines appear above it.
    """

    def __init__(self, total: int, clip_norm: float = 0.0):
        """Create a display that isn't shown yet.

        Args:
            total: steps in the whole run.
            clip_norm: the largest gradient norm; 0 if gradients aren't clipped.
        """
        self._total = total
        self._state = LiveState(total, clip_norm)
        self._lock = threading.Lock()  # the panel draws in a thread
        self._panel: Panel | None = None

    def __enter__(self) -> "TrainingDisplay":
        """Show the display."""
        screen, self._state.began = console(), time.monotonic()
        if screen.is_interactive and not screen.quiet and screen.file.isatty():
            from minigpt_cli.report.panel import Panel  # here: only a terminal needs it

            self._panel = Panel(screen, self._draw)
            self._panel.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the view; the lines above it remain."""
        if self._panel is not None:
            self._panel.stop()
            self._panel = None

    def restart(
        self, step: int, metrics: list[dict[str, Any]], samples: list[dict[str, Any]]
    ) -> None:
        """Show a run that goes on from a checkpoint. See ``LiveState.restart``."""
        with self._lock:
            self._state.restart(step, metrics, samples)
        self._update()

    def step(self, values: dict[str, Any], seconds_left: float) -> None:
        """Show a logged step.

        Args:
            values: the step's line of metrics.jsonl.
            seconds_left: an estimate.
        """
        with self._lock:
            state = self._state
            state.step, state.values, state.seconds_left = values["step"], values, seconds_left
            state.add(values)
        self._update()
        if self._panel is None:
            log(step_line(values, self._total, seconds_left))
        else:
            log(history_line(values, console().width))

    def evaluated(self, values: dict[str, Any]) -> None:
        """Show an evaluation: its line of metrics.jsonl."""
        with self._lock:
            self._state.add(values)
        self._update()

    def sampled(self, prompt: str, completion: str) -> None:
        """Show a completed prompt."""
        self._state.sample = prompt + completion
        self._update()

    def saved(self, step: int) -> None:
        """Show that a checkpoint has just been saved."""
        with self._lock:
            self._state.note_save(step)
        self._update()

    def _update(self) -> None:
        if self._panel is not None:
            self._panel.update()

    def _draw(self, width: int, height: int) -> "list[Text]":
        ascii_only = not console().encoding.startswith("utf")
        with self._lock:
            return view_lines(self._state, width, height, ascii_only=ascii_only)
