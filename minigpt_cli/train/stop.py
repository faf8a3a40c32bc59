"""Signals that ask a run to stop: noted, and acted on at the next step boundary."""

import signal
from types import FrameType

from minigpt_cli import stopping


class StopRequest:
    """While entered, a signal only sets ``signum``.

    Further signals do no harm, also after the end: a launcher may send one to a process that has
    just saved.
    """

    def __init__(self) -> None:
        self.signum = stopping.first_signal()  # whose exception a library has swallowed
        self._previous: dict[int, signal._HANDLER] = {}

    def __bool__(self) -> bool:
        return self.signum is not None

    def __enter__(self) -> "StopRequest":
        for signum in stopping.SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:  # nohup, and background jobs
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items() if not self else ():
            signal.signal(signum, handler)
