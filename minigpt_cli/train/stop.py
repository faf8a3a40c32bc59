"""Signals that ask a run to stop: noted, and acted on at the next step boundary."""

import signal
from types import FrameType

from minigpt_cli.core.signals import first_signal


class StopRequest:
    """While entered, SIGINT, SIGTERM, SIGUSR1 (Slurm's --signal) and SIGHUP (the terminal is gone)
    only set ``signum``; more of them do no harm, also after the end: a launcher may well send one
    to a process that has just saved."""

    def __init__(self) -> None:
        self.signum = first_signal()  # whose exception a library has swallowed
        self._previous: dict[int, signal._HANDLER] = {}

    def __bool__(self) -> bool:
        return self.signum is not None

    def __enter__(self) -> "StopRequest":
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            if signal.getsignal(signum) != signal.SIG_IGN:  # nohup, and background jobs
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._previous.items() if not self else ():
            signal.signal(signum, handler)
