"""Signals that ask a training run to stop at the end of the current step."""

import signal
from types import FrameType

from minigpt_cli.core.signals import SIGNALS, first_signal


class StopRequest:
    """A context in which signals only set ``signum``.

    After a signal the handlers stay in place on exit: a launcher may send a second signal to a
    process that has just saved.

    Attributes:
        signum: the first signal that came; None so far.
    """

    def __init__(self) -> None:
        """Note a signal that came earlier, in case a library caught its exception."""
        self.signum = first_signal()
        self._previous: dict[int, signal._HANDLER] = {}

    def __bool__(self) -> bool:
        """Return whether a signal came."""
        return self.signum is not None

    def __enter__(self) -> "StopRequest":
        """Install the handlers, except for signals that are ignored (nohup, background jobs)."""
        for signum in SIGNALS:
            if signal.getsignal(signum) != signal.SIG_IGN:
                self._previous[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum

    def __exit__(self, *error: object) -> None:
        """Restore the previous handlers, unless a signal came."""
        for signum, handler in self._previous.items() if not self else ():
            signal.signal(signum, handler)
