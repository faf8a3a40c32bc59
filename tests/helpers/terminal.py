"""A terminal for tests: a real pty whose screen pyte emulates."""

import contextlib
import fcntl
import os
import pty
import select
import struct
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pyte
from pyte.screens import Char

from tests.helpers.processes import Process


class Screen(pyte.HistoryScreen):
    """pyte's screen, resized as VTE, kitty and tmux do it: lines are wrapped anew.

    What is above the cursor stays above it, and scrolls into the history where there is no room.
    """

    def resize(self, lines: int | None = None, columns: int | None = None) -> None:
        assert lines is not None
        assert columns is not None
        rows, row_of_cursor, x = [], 0, self.cursor.x
        for y in range(self.lines):
            row = [self.buffer[y][column] for column in range(self.columns)]
            while row and row[-1].data == " ":
                row.pop()
            if y == self.cursor.y:
                row_of_cursor = len(rows) + x // columns
            rows += [row[start : start + columns] for start in range(0, len(row) or 1, columns)]
        while len(rows) > row_of_cursor + 1 and not rows[-1]:
            rows.pop()
        hidden = max(0, row_of_cursor + 1 - lines, min(len(rows) - lines, row_of_cursor))
        self.history.top.extend(dict(enumerate(row)) for row in rows[:hidden])
        self.lines, self.columns = lines, columns
        self.reset_buffer(rows[hidden : hidden + lines])
        self.set_margins()
        self.cursor.y, self.cursor.x = row_of_cursor - hidden, x % columns

    def reset_buffer(self, rows: list[list[Char]]) -> None:
        """Show these rows, and nothing else."""
        self.buffer.clear()
        for y, row in enumerate(rows):
            self.buffer[y].update(enumerate(row))
        self.dirty.update(range(self.lines))


class Terminal:
    """A pty to give to a process, and what its screen shows.

    Attributes:
        path: of the device, for the process to open.
        screen: of pyte.
    """

    def __init__(self, columns: int, lines: int):
        self.screen = Screen(columns, lines, history=10_000, ratio=0.001)
        self._stream = pyte.ByteStream(self.screen)
        self._ours, self._theirs = pty.openpty()
        self.path = Path(os.ttyname(self._theirs))
        self._set_size(columns, lines)

    def _set_size(self, columns: int, lines: int) -> None:
        size = struct.pack("HHHH", lines, columns, 0, 0)
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, size)

    def resize(self, columns: int, lines: int) -> None:
        """Change the size, as a user who drags a window's corner."""
        self.read()
        self.screen.resize(lines, columns)
        self._set_size(columns, lines)

    def press(self, key: bytes) -> None:
        """Type a key: b"\\x03" is Ctrl-C."""
        os.write(self._ours, key)

    def read(self, seconds: float = 0.0) -> None:
        """Take what was written, waiting at most so long for the first of it."""
        while select.select([self._ours], [], [], seconds)[0]:
            with contextlib.suppress(OSError):
                self._stream.feed(os.read(self._ours, 1 << 16))
            seconds = 0.0

    @property
    def shown(self) -> list[str]:
        """The screen's lines, without trailing blanks."""
        return [line.rstrip() for line in self.screen.display]

    @property
    def scrolled(self) -> list[str]:
        """The lines that have left the screen at its top."""
        return [
            "".join(
                row[x].data if x in row else " " for x in range(max(row, default=-1) + 1)
            ).rstrip()
            for row in self.screen.history.top
        ]

    def wait_for(self, condition: Callable[[list[str]], object], seconds: float = 120) -> list[str]:
        """Read until the condition holds for the screen's lines; return them.

        Raises:
            AssertionError: it never did.
        """
        deadline = time.monotonic() + seconds
        while not condition(self.shown):
            assert time.monotonic() < deadline, "the screen shows:\n" + "\n".join(self.shown)
            self.read(0.05)
        return self.shown

    def wait(self, process: Process) -> int:
        """Read until the process has ended; return its exit code."""
        deadline = time.monotonic() + 120
        while process.code is None:  # a full pty would block it
            assert time.monotonic() < deadline, process.stacks()
            self.read(0.05)
        self.read()
        return process.wait()

    def close(self) -> None:
        os.close(self._ours)
        os.close(self._theirs)
