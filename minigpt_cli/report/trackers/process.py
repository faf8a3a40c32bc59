"""The process in which one tracker's library works: ``python -m`` this module NAME.

A library of a tracker starts threads and processes, installs hooks, prints, and may wait for a
network. In a process of its own it can't change or delay training, and what it was sent is not
lost if training is killed. It reads one JSON object per line and answers likewise; it ends when its
input does. The kernel ends it where it takes too long (``SIGALRM``).
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.core.files import locked
from minigpt_cli.core.run_dir import METRICS, SAMPLES, tracker_lock
from minigpt_cli.core.signals import ignore_signals
from minigpt_cli.report.metrics import split_lines
from minigpt_cli.report.trackers.tracker import TrackedRun, Tracker

SECONDS = 60  # for one row, and for the end
_START_SECONDS = 300  # an earlier part's rows may be sent again
_LOCK_SECONDS = 30  # for the process of a run that was killed
_LONGEST_ANSWER = 2000  # characters: threads' answers must not mix (PIPE_BUF)

_answers = -1


def main() -> None:
    global _answers
    ignore_signals()
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    _answers = os.dup(1)
    os.dup2(2, 1)  # prints of libraries
    name = sys.argv[1]
    try:
        _answer({"ready": _check(name)})
    except UserError as error:
        _answer({"error": str(error)})
        return
    except Exception as error:  # a broken installation
        _answer({"error": f"{name} can't be used: {first_line(error)}"})
        return
    with contextlib.ExitStack() as resources:
        tracking = _Tracking(name, resources)
        for line in sys.stdin.buffer:
            tracking.handle(json.loads(line))
        tracking.finish(exit_code=1)  # without a last word: training was killed
        os._exit(0)  # what libraries do at the interpreter's exit may wait for the network


class _Tracking:
    """One tracker, and how it is doing.

    A failure is reported once. After a failed start no row is logged until the next start.
    """

    def __init__(self, name: str, resources: contextlib.ExitStack):
        self._name, self._resources = name, resources
        self._tracker: Tracker | None = None
        self._is_locked = self._has_failed = False
        self._texts = (0, 0)  # the last step with completed prompts, and how many of them

    def handle(self, message: dict[str, Any]) -> None:
        """Do what the training process asks for."""
        if "row" in message:
            if self._tracker is not None:
                with self._reported("a row was not written", SECONDS):
                    self._log(message["row"])
        elif "finish" in message:
            self.finish(message["finish"])
        else:
            run = message["start"] | {"directory": Path(message["start"]["directory"])}
            self.finish(exit_code=None)
            with self._reported("it can't start", _START_SECONDS):
                self._start(TrackedRun(**run))

    def finish(self, exit_code: int | None) -> None:
        """End the tracker's run; see ``Tracker``."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with self._reported("it can't end", SECONDS):
                tracker.finish(exit_code)

    def _start(self, run: TrackedRun) -> None:
        if not self._is_locked:
            _wait_for_lock(tracker_lock(run.directory, self._name), self._resources)
            self._is_locked = True
        self._texts = (0, 0)
        self._tracker = tracker = _start_library(self._name, run)
        _answer({"message": tracker.message})
        for row in _rows(run):
            if row["step"] >= tracker.next_step:
                self._log(row)

    def _log(self, row: dict[str, Any]) -> None:
        assert self._tracker is not None
        step = row["step"]
        if "completion" in row:  # of the prompts of one evaluation, in their order
            number = self._texts[1] + 1 if self._texts[0] == step else 1
            self._texts = (step, number)
            values: dict[str, Any] = {f"sample_{number}": f"{row['prompt']}{row['completion']}"}
        else:
            values = {
                key: value
                for key, value in row.items()
                if key not in ("step", "time") and isinstance(value, int | float)
            }
        self._tracker.log(step, row.get("time", time.time()), values)

    @contextlib.contextmanager
    def _reported(self, what: str, seconds: int) -> Iterator[None]:
        """Report a failure, once; end this process where the block takes longer."""
        signal.alarm(seconds)
        try:
            yield
        except Exception as error:
            if not self._has_failed:
                self._has_failed = True
                _answer({"warning": f"{what}: {first_line(error)}"})
        finally:
            signal.alarm(0)


def _check(name: str) -> bool:
    """Import what the tracker needs.

    Returns:
        Whether a later process can go on in the same part of a run.

    Raises:
        UserError: something is missing.
    """
    if name == "wandb":
        from minigpt_cli.report.trackers.wandb import check_wandb

        return check_wandb()
    return True


def _start_library(name: str, run: TrackedRun) -> Tracker:
    if name == "tensorboard":
        from minigpt_cli.report.trackers.tensorboard import start_tensorboard

        return start_tensorboard(run)
    if name == "wandb":
        from minigpt_cli.report.trackers.wandb import start_wandb

        return start_wandb(run)
    assert name == "trackio", name
    from minigpt_cli.report.trackers.trackio import start_trackio

    return start_trackio(run, lambda text: _answer({"warning": text}))


def _rows(run: TrackedRun) -> list[dict[str, Any]]:
    """Return the curve up to the step from which the run goes on, in the order of its steps."""
    if not run.step:
        return []
    rows = []
    for name in (METRICS, SAMPLES):
        rows += split_lines(run.directory, run.step, run.is_evaluated, name)[0]
    return sorted(rows, key=lambda row: row["step"])


def _wait_for_lock(file: Path, resources: contextlib.ExitStack) -> None:
    """Wait until the tracker's process of a killed run has written all that it was sent."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            resources.enter_context(locked(file, "busy"))
            return
        except UserError:
            time.sleep(0.1)
        except OSError:  # a disk without locks
            return


def _answer(message: dict[str, Any]) -> None:
    short = {
        key: value[:_LONGEST_ANSWER] if isinstance(value, str) else value
        for key, value in message.items()
    }
    with contextlib.suppress(OSError):  # training has ended
        os.write(_answers, json.dumps(short).encode() + b"\n")


if __name__ == "__main__":
    main()
