"""Report the progress of a tokenization, and the first of the bad lines that it meets."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from minigpt_cli.core.console import console, counted, log
from minigpt_cli.prepare.journal import State

_SHOWN_BAD_LINES = 20
_LOG_SECONDS = 10.0  # between two lines where there is no terminal


@dataclass(frozen=True)
class Progress:
    """How far a tokenization is.

    Attributes:
        phase: "measuring the text", "training the tokenizer" or "tokenizing".
        bytes: UTF-8 bytes of text so far.
        total_bytes: UTF-8 bytes of all text. Before the text is measured: bytes of the source's
            files, at least those of its text; None if their sizes don't say.
        documents: Documents so far.
        tokens: Tokens so far.
        bad: Bad lines so far.
        resumed_bytes: The part of ``bytes`` that an earlier, interrupted call did.
        seconds: Since this call began the phase.
    """

    phase: str
    bytes: int = 0
    total_bytes: int | None = None
    documents: int = 0
    tokens: int = 0
    bad: int = 0
    resumed_bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        rate = (self.bytes - self.resumed_bytes) / max(self.seconds, 1e-9)
        line = f"{self.phase}: {self.bytes / 1e6:,.1f} MB"
        if self.total_bytes:
            line += f" of {self.total_bytes / 1e6:,.1f} ({self.bytes / self.total_bytes:.0%})"
        line += f", {counted(self.documents, 'document')}, {rate / 1e6:.1f} MB/s"
        return line + (f", {self.bad:,} skipped" if self.bad else "")


class ProgressReporter:
    """Calls ``progress``, if there is one, with how far the work is."""

    def __init__(self, progress: Callable[[Progress], None] | None, total_bytes: int | None):
        self._progress = progress
        self._now = Progress("starting", total_bytes=total_bytes)
        self._began = time.monotonic()

    def begin(self, phase: str, resumed_bytes: int = 0) -> None:
        """Begin a phase, of which an earlier call did ``resumed_bytes``."""
        self._began = time.monotonic()
        self._now = replace(self._now, phase=phase, resumed_bytes=resumed_bytes)

    def measured(self, total_bytes: int) -> None:
        """Take the exact size of the text, if it was measured (else 0)."""
        self._now = replace(self._now, total_bytes=total_bytes or self._now.total_bytes)

    def read(self, size: int, documents: int) -> None:
        """Report how many bytes and documents were read, before any is encoded."""
        self._report(bytes=size, documents=documents)

    def written(self, state: State) -> None:
        """Report what was encoded and written."""
        self._report(
            bytes=sum(state.bytes),
            documents=sum(state.documents),
            tokens=state.tokens,
            bad=state.place.position.bad,
        )

    def _report(self, **counts: int) -> None:
        if self._progress is not None:
            seconds = time.monotonic() - self._began
            self._progress(replace(self._now, seconds=seconds, **counts))  # type: ignore[arg-type]


@dataclass
class BadLines:
    """Counts bad lines and reports the first of them.

    Attributes:
        warn: Called with one line for each of the first 20.
        count: Bad lines so far.
    """

    warn: Callable[[str], None]
    count: int = 0

    def __call__(self, message: str) -> None:
        self.count += 1
        if self.count <= _SHOWN_BAD_LINES:
            self.warn(message)
        elif self.count == _SHOWN_BAD_LINES + 1:
            self.warn("further bad lines are counted but not shown")


@contextlib.contextmanager
def progress_display() -> Iterator[Callable[[Progress], None]]:
    """Give a function that shows progress: as a bar with the time left on a terminal, or as a log
    line every few seconds."""
    if console().is_terminal:
        with _bar() as show:
            yield show
        return
    shown = time.monotonic()

    def log_line(progress: Progress) -> None:
        nonlocal shown
        if time.monotonic() - shown > _LOG_SECONDS:
            shown = time.monotonic()
            log(str(progress))

    yield log_line


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[state]}"),
        progress.TimeRemainingColumn(),
        console=console(),
        transient=True,
    )
    tasks: dict[str, progress.TaskID] = {}

    def show(now: Progress) -> None:
        with contextlib.suppress(OSError):  # the terminal may have gone
            if now.phase not in tasks:
                for task in tasks.values():
                    bar.remove_task(task)
                tasks.clear()
                tasks[now.phase] = bar.add_task(now.phase, state="", completed=now.resumed_bytes)
            rate = (now.bytes - now.resumed_bytes) / max(now.seconds, 1e-9)
            state = f"{counted(now.documents, 'document')}, {rate / 1e6:.1f} MB/s"
            bar.update(tasks[now.phase], total=now.total_bytes, completed=now.bytes, state=state)

    with contextlib.suppress(OSError):
        bar.start()
    try:
        yield show
    finally:
        with contextlib.suppress(OSError):
            bar.stop()
