"""What a tokenization tells while it works: counters, and the first of the bad lines."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from minigpt_cli.core.console import console, log
from minigpt_cli.prepare.journal import State

_REPORTED_BAD = 20


@dataclass(frozen=True)
class Progress:
    """Where a tokenization is.

    ``phase``: "training the tokenizer" or "tokenizing". ``bytes`` of UTF-8 text, ``documents``,
    ``tokens`` and ``bad`` lines so far, of which ``resumed_bytes`` were done by an earlier,
    interrupted run; ``total_bytes`` when the source's size tells (None: unknown); ``seconds`` since
    this run began.
    """

    phase: str
    bytes: int = 0
    total_bytes: int | None = None
    documents: int = 0
    tokens: int = 0
    bad: int = 0
    resumed_bytes: int = 0
    seconds: float = 0.0


class ProgressReporter:
    """Hands the caller's ``progress`` where the work is; does nothing without one."""

    def __init__(self, progress: Callable[[Progress], None] | None, total_bytes: int | None):
        self._progress = progress
        self._now = Progress("starting", total_bytes=total_bytes)
        self._began = time.monotonic()

    def begin(self, phase: str, resumed_bytes: int = 0) -> None:
        self._began = time.monotonic()
        self._now = replace(self._now, phase=phase, resumed_bytes=resumed_bytes)

    def read(self, size: int, documents: int) -> None:
        self._tell(bytes=size, documents=documents)

    def written(self, state: State) -> None:
        self._tell(
            bytes=sum(state.bytes),
            documents=sum(state.documents),
            tokens=state.tokens,
            bad=state.place.position.bad,
        )

    def _tell(self, **changes: int) -> None:
        if self._progress is not None:
            seconds = time.monotonic() - self._began
            self._progress(replace(self._now, seconds=seconds, **changes))  # type: ignore[arg-type]


@dataclass
class BadLines:
    """Counts the bad lines that are met and reports the first of them."""

    warn: Callable[[str], None]
    count: int = 0

    def __call__(self, message: str) -> None:
        self.count += 1
        if self.count <= _REPORTED_BAD:
            self.warn(message)
        elif self.count == _REPORTED_BAD + 1:
            self.warn("further bad lines are counted but not shown")


class TokenizingDisplay:
    """Bytes, documents and rate: a live line on a terminal, a line every few seconds elsewhere."""

    SECONDS = 10.0

    def __init__(self) -> None:
        self._console = console()
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
            log(line)
