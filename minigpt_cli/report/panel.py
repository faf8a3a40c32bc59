"""Keep lines at the bottom of a terminal, below all that is printed.

The cursor rests at the start of the lines, not at their end as in rich's Live. So the next printing
erases them whatever the terminal made of them: a resize may have wrapped or cut each line. A
stranger's output also lands above them.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console, ConsoleRenderable, RenderHook
from rich.file_proxy import FileProxy
from rich.segment import ControlType, Segment, Segments
from rich.text import Text

from minigpt_cli.core.signals import SIGNALS

_TICK = 0.25  # seconds between two looks at the terminal's size
_MAX_AGE = 1.0  # seconds after which the lines are drawn again: they show times
_ERASE_BELOW, _NO_WRAP, _WRAP = "\x1b[J", "\x1b[?7l", "\x1b[?7h"


class Panel(RenderHook):
    """Lines that are drawn again at most a few times a second, in a thread of their own.

    Lines above the panel are printed as usual, with the same console.
    """

    def __init__(self, console: Console, draw: Callable[[int, int], list[Text]]):
        """Create a panel that isn't shown yet.

        Args:
            console: of a terminal.
            draw: returns the lines for a width and a height in cells. They must be narrower than
                the width and fewer than the height. Several threads call it, one at a time.
        """
        self._console = console
        self._draw = draw
        self._lock = threading.Lock()
        self._frame: list[Segment] = []
        self._size: tuple[int, int] | None = None  # that the frame was drawn for
        self._drawn_at = 0.0
        self._is_stale = True
        self._has_gone = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="live view", daemon=True)
        self._streams = sys.stdout, sys.stderr

    def start(self) -> None:
        """Show the panel."""
        self._console.push_render_hook(self)
        for name in ("stdout", "stderr"):  # Python's own warnings: print them above the panel
            stream = getattr(sys, name)
            if stream is not None and stream.isatty():
                setattr(sys, name, FileProxy(self._console, stream))
        self._thread.start()
        with contextlib.suppress(OSError):
            self._print_nothing()

    def stop(self) -> None:
        """Remove the panel."""
        self._stopped.set()
        self._thread.join()
        sys.stdout, sys.stderr = self._streams
        self._console.pop_render_hook()
        if _is_in_foreground():
            with contextlib.suppress(OSError):  # the terminal may have gone
                self._console.print(Segments([_control(_ERASE_BELOW)]))

    def update(self) -> None:
        """Draw the panel again: with the next line that is printed, or soon."""
        self._is_stale = True

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """Put the panel below what the console prints; rich calls it."""
        if self._has_gone or not _is_in_foreground():
            return renderables
        with self._lock:
            if self._is_due():
                self._frame = self._new_frame()
            return [Segments([_control(_ERASE_BELOW)]), *renderables, Segments(self._frame)]

    def _is_due(self) -> bool:
        age = time.monotonic() - self._drawn_at
        return (
            age >= _MAX_AGE
            or (self._is_stale and age >= _TICK)
            or tuple(self._console.size) != self._size
        )

    def _new_frame(self) -> list[Segment]:
        self._is_stale, self._drawn_at = False, time.monotonic()
        width, height = self._console.size
        self._size = width, height
        lines = self._draw(width, height)
        frame = [_control(_NO_WRAP)]
        for line in lines:
            frame += [*line.render(self._console), Segment("\n")]
        up = f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else ""
        return [*frame[:-1], _control(f"{_WRAP}\r{up}")]

    def _refresh(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the main thread handles them
        while not self._stopped.wait(_TICK):
            if self._is_due():
                try:
                    self._print_nothing()
                except OSError:  # the terminal has gone
                    self._has_gone = True
                    return

    def _print_nothing(self) -> None:
        self._console.print(Segments([]))


def _control(codes: str) -> Segment:
    """Return a segment that rich prints as it is."""
    return Segment(codes, None, [(ControlType.CLEAR,)])


def _is_in_foreground() -> bool:
    """Return whether the terminal is ours, and not the shell's or another job's."""
    try:
        return os.tcgetpgrp(2) == os.getpgrp()
    except OSError:  # it controls another session: the launcher's, who started this rank
        return _is_parent_in_foreground()


def _is_parent_in_foreground() -> bool:
    """Return whether the parent's terminal is the parent's; also if nobody knows."""
    try:
        text = Path(f"/proc/{os.getppid()}/stat").read_text()
        group, _, _, foreground = text.rpartition(") ")[2].split()[2:6]
    except (OSError, ValueError):
        return True
    return foreground in (group, "-1")
