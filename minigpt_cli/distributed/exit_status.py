"""How the exit codes and signals of several worker processes become one exit code and one line."""

import signal
from dataclasses import dataclass
from pathlib import Path

from minigpt_cli.core.errors import EXPLAINED_CODES, STOP_CODES
from minigpt_cli.core.faq import faq
from minigpt_cli.core.run_dir import checkpoint_step, checkpoints_dir


@dataclass(frozen=True)
class ExitStatus:
    """How one worker, or several together, ended.

    Attributes:
        code: the exit code.
        message: one line about it; empty if a worker has printed its own.
    """

    code: int
    message: str = ""

    @property
    def failed(self) -> bool:
        return self.code not in (0, *STOP_CODES)


DONE = ExitStatus(0)


def resume_hint(run: Path | None) -> str:
    """Return what to do after a rank was lost.

    Args:
        run: the run directory; None before training begins.
    """
    found = () if run is None else checkpoints_dir(run).glob("step-*")
    if all(checkpoint_step(path) is None for path in found):
        return f"run the same command again {faq('it-hangs')}"
    return f"go on from the last checkpoint with `minigpt resume {run}` {faq('it-hangs')}"


def exit_status(worker: str, returncode: int, run: Path | None) -> ExitStatus:
    """Return how one worker ended.

    Args:
        worker: its name in messages.
        returncode: as Popen gives it: the exit code, or minus the signal that killed the worker.
        run: the run directory, for the message; None if there is none.
    """
    if returncode == 0 or returncode in EXPLAINED_CODES:
        return ExitStatus(returncode)
    if returncode > 0:
        return ExitStatus(1, f"{worker} ended with exit code {returncode}; {resume_hint(run)}")
    memory = ", probably out of memory" if -returncode == signal.SIGKILL else ""
    name = _signal_name(-returncode)
    return ExitStatus(1, f"{worker} was killed by {name}{memory}; {resume_hint(run)}")


def merge_exit_status(known: ExitStatus, new: ExitStatus) -> ExitStatus:
    """Return the status of all workers after one more has ended.

    The first failure counts: later ones are its consequences. 75 and 130 promise that everything is
    saved, so they hold only if no worker failed.
    """
    if new.failed and not known.failed:
        return new
    return new if known == DONE else known


def report_order(status: ExitStatus) -> int:
    """Return the sort key of workers that ended at the same moment, the likeliest cause first:
    an explained failure, a crash, a consequence of either, a stop."""
    if status.code in (2, 3, 4):
        return 0
    if status.failed:
        return 1 if status.message else 2
    return 3


def _signal_name(signum: int) -> str:
    try:
        return signal.Signals(signum).name
    except ValueError:  # a real-time signal
        return f"signal {signum}"
