"""The worker processes on this node: what is sent to them, and how they ended."""

import contextlib
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

SAVED = (75, 130)
"""Exit codes of a worker that a signal stopped and that saved."""

EXPLAINED = (1, 2, 3, 4, *SAVED)
"""Exit codes with which a worker has printed its own message."""

RESUME = "go on from the last checkpoint with `minigpt resume RUN`"


@dataclass(frozen=True)
class Patience:
    """Seconds to wait for others."""

    reach: float = 45
    """for somebody to listen at the rendezvous"""
    join: float = 600
    """for the other nodes to come to it"""
    saved: float = 300
    """for the other workers, once one has stopped and saved"""
    failed: float = 10
    """for the other workers, once one has failed: they fail by themselves, or hang"""
    terminated: float = 20
    """after that, between SIGTERM and SIGKILL"""


@dataclass(frozen=True)
class Ending:
    """How workers ended, in one exit code, and a line about it if no worker has printed one."""

    code: int
    message: str = ""

    @property
    def failed(self) -> bool:
        return self.code not in (0, *SAVED)


DONE = Ending(0)


def ending(worker: str, returncode: int, sent: Collection[int]) -> Ending:
    """How one worker ended: ``returncode`` is Popen's, ``sent`` are the signals passed on to it."""
    if returncode == 0 or returncode in EXPLAINED:
        return Ending(returncode)
    if returncode > 0:
        return Ending(1, f"{worker} ended with exit code {returncode}; {RESUME}")
    name = _name(-returncode)
    if -returncode in sent:  # it had not begun to handle signals
        again = "before training began; run the same command again to go on"
        return Ending(exit_code(-returncode), f"stopped by {name} {again}")
    memory = " (out of memory?)" if -returncode == signal.SIGKILL else ""
    return Ending(1, f"{worker} was killed by {name}{memory}; {RESUME}")


def exit_code(signum: int) -> int:
    """What a command ends with that this signal stopped."""
    return 130 if signum == signal.SIGINT else 75


def worse(known: Ending, new: Ending) -> Ending:
    """What two endings make together, ``known`` being the earlier one.

    The first failure counts: later ones are its consequences. 75 and 130 promise that everything is
    saved, so they hold only if no worker failed at all.
    """
    if new.failed and not known.failed:
        return new
    return new if known == DONE else known


def _tells_most(ended: Ending) -> int:
    """Order of endings seen at the same moment: a worker's verdict, a death, what follows them."""
    if ended.code in (2, 3, 4):
        return 0
    if ended.failed:
        return 1 if ended.message else 2
    return 4 if ended.message else 3  # stopped; better the one that has been told already


class Workers:
    """The processes by rank, and the signals for them, which may come before they are there."""

    AGAIN = 5.0
    """Seconds within which a second signal is taken for the first one's echo. Later it is passed
    on: the first may have got lost in a worker, and workers that are saving bear it."""

    def __init__(self) -> None:
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.signum: int | None = None
        """the first signal"""
        self._sent: list[int] = []
        self._last = -math.inf
        self._lock = threading.Lock()

    def started(self, processes: dict[int, subprocess.Popen[bytes]]) -> None:
        with self._lock:
            self.processes = processes
            if self.signum is not None:
                self._send(self.signum)

    def stop(self, signum: int) -> None:
        """Pass a signal on to the workers, who save and stop."""
        with self._lock:
            if time.monotonic() - self._last < self.AGAIN:
                return
            self._last = time.monotonic()
            self.signum = self.signum or signum
            self._sent.append(signum)
            self._send(signum)

    def terminate(self) -> None:
        self._send(signal.SIGTERM)

    def kill(self) -> None:
        """Kill those that are left, and what they have started."""
        for process in self.processes.values():
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)  # each leads a group of its own

    def _send(self, signum: int) -> None:
        for process in self.processes.values():
            process.send_signal(signum)

    def wait(
        self, name: Callable[[int], str], patience: Patience, exchange: Callable[[Ending], Ending]
    ) -> Ending:
        """Wait until all have ended.

        As long as all run, or end with 0, this takes as long as it takes. Once one has stopped or
        failed, the others have ``patience``; then they get SIGTERM, and then they are killed.

        Args:
            name: a rank in words.
            exchange: tells other nodes what is known here; returns what they make of it.
        """
        running = dict(self.processes)
        known = timed = DONE
        terminate_at = kill_at = give_up_at = math.inf
        while running and time.monotonic() < give_up_at:
            time.sleep(0.1)
            codes = {rank: process.poll() for rank, process in running.items()}
            ended = {rank: code for rank, code in codes.items() if code is not None}
            running = {rank: running[rank] for rank in running.keys() - ended.keys()}
            endings = [ending(name(rank), code, self._sent) for rank, code in ended.items()]
            for new in sorted(endings, key=_tells_most):
                known = worse(known, new)
            known = exchange(known)
            now = time.monotonic()
            if timed == DONE != known or known.failed > timed.failed:
                timed = known
                terminate_at = now + (patience.failed if known.failed else patience.saved)
                kill_at = terminate_at + patience.terminated
            if now > terminate_at:
                terminate_at = math.inf
                self.terminate()
            if now > kill_at and running:
                kill_at = math.inf
                give_up_at = now + patience.terminated  # some hang in the kernel, out of reach
                self.kill()
                left = ", ".join(name(rank) for rank in sorted(running))
                hung = Ending(1, f"{left} did not end with the others and was killed; {RESUME}")
                known = timed = worse(known, hung)
        return known


def _name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal
        return f"signal {signum}"
