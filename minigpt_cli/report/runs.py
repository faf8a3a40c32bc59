"""What was trained under a directory: a line for each run, from a few small reads.

Nothing is verified, and of metrics.jsonl only the end is read: hundreds of long runs take a second.
"""

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.reading import read_json
from minigpt_cli.core.run_dir import (
    LOCK,
    METRICS,
    RECIPE,
    STATE,
    STATUS,
    checkpoint_step,
    checkpoints_dir,
    is_checkpoint,
)
from minigpt_cli.recipe import load_recipe
from minigpt_cli.report.metrics import read_last

T = TypeVar("T")
_MOST = 1 << 63  # no number of ours is larger
_STATUSES = ("running", "finished", "stopped", "diverged", "failed")


@dataclass(frozen=True)
class RunSummary:
    """What is known of a run. None: it isn't known, or there was none.

    Attributes:
        path: the run directory.
        status: running, finished, stopped, diverged, failed; killed: it says running, but no
            process holds its lock; unknown: it runs on another machine, or doesn't say; damaged:
            some of its files can't be read.
        message: why it ended so, or what is damaged.
        host: where its last process ran.
        step: the last one that is known of.
        total_steps: of its recipe.
        checkpoint_step: of the newest checkpoint, which is not verified.
        loss: training loss at the last logged step.
        val_loss: at the last evaluation.
        best_val_loss: the lowest one, as of the newest checkpoint or evaluation.
        tokens: trained on so far.
        seconds: of training so far, over all its processes.
        time: the last sign of life, in seconds since 1970.
    """

    path: Path
    status: str
    message: str = ""
    host: str | None = None
    step: int | None = None
    total_steps: int | None = None
    checkpoint_step: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    tokens: int | None = None
    seconds: float | None = None
    time: float | None = None


def find_runs(directory: Path) -> list[RunSummary]:
    """Return a summary of each run in or under a directory, the newest first.

    Args:
        directory: a run, or a directory that holds some at any depth. Links are followed.

    Raises:
        UserError: there is no such directory.
    """
    if not directory.is_dir():
        what = "is no directory" if os.path.lexists(directory) else "no such directory"
        raise UserError(f"{directory}: {what}; name one that holds runs")
    found = []
    for path in _run_directories(directory):
        with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
            found.append(summarize(path))
    return sorted(found, key=lambda run: (-(run.time or 0), str(run.path)))


def summarize(run: Path) -> RunSummary:
    """Return what is known of one run. A file that can't be read is part of the summary.

    Raises:
        FileNotFoundError: the run was deleted meanwhile.
    """
    problems: list[str] = []
    status = _read_status(run, problems)
    recipe = None
    if os.path.lexists(run / RECIPE):  # else the run still prepares its data
        recipe = _attempt(problems, lambda: load_recipe(run / RECIPE, name=run.name))
    saved_step, checkpoint = max(_checkpoint_steps(run), default=(None, None))
    state = {}
    if checkpoint is not None:
        found: list[str] = []
        state = _attempt(found, lambda: read_json(checkpoint / STATE)) or {}
        if checkpoint.exists():  # else a rollback has just moved it away
            problems += found
    last, evaluation = _attempt(problems, lambda: read_last(run)) or ({}, {})
    steps = [_integer(each) for each in (status.get("step"), last.get("step"), saved_step)]
    times = [_seconds_since_1970(status.get("time")), last.get("time"), evaluation.get("time")]
    summary = RunSummary(
        path=run,
        status=status.get("status", "unknown"),
        message=str(status.get("message") or ""),
        host=str(status["host"]) if "host" in status else None,
        step=next((each for each in steps if each is not None), None),
        total_steps=None if recipe is None else recipe.total_steps,
        checkpoint_step=saved_step,
        loss=_number(last.get("loss")),
        val_loss=_number(evaluation.get("val_loss", state.get("val_loss"))),
        tokens=_integer(last.get("tokens", state.get("tokens"))),
        seconds=_number(last.get("seconds")),
        time=_greatest(times) or run.stat().st_mtime,
    )
    losses = [summary.val_loss, _number(state.get("best_val_loss"))]
    best = min((each for each in losses if each is not None), default=None)
    summary = replace(summary, best_val_loss=best)
    if summary.status == "running":
        summary = _is_it_running(summary)
    if problems:
        return replace(summary, status="damaged", message="; ".join(problems))
    return summary


def _run_directories(directory: Path) -> Iterator[Path]:
    """Yield each run once, whatever links lead to it. Nothing inside a run is one."""
    seen: set[tuple[int, int]] = set()
    left = [directory]
    while left:
        path = left.pop()
        with contextlib.suppress(OSError):  # not readable, or just removed
            found = path.stat()
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            if is_run(path):
                yield path
            elif not is_checkpoint(path):
                with os.scandir(path) as entries:
                    left += [
                        path / entry.name
                        for entry in entries
                        if not entry.name.startswith(".") and entry.is_dir()
                    ]


def is_run(path: Path) -> bool:
    """Return whether a directory is a run, also a damaged one."""
    if is_checkpoint(path):
        return False
    with contextlib.suppress(OSError, UserError):
        if any(True for _ in _checkpoint_steps(path)):
            return True
        if (path / RECIPE).exists():
            return any(os.path.lexists(path / name) for name in (STATUS, METRICS))
        if (path / STATUS).is_file():  # perhaps another program's
            return read_json(path / STATUS).keys() >= {"status", "exit_code", "pid"}
    return False


def _checkpoint_steps(run: Path) -> Iterator[tuple[int, Path]]:
    """Yield (step, directory) of each checkpoint, without verifying it."""
    with contextlib.suppress(OSError):  # there are none, or they can't be read
        for path in checkpoints_dir(run).iterdir():
            if (step := checkpoint_step(path)) is not None:
                yield step, path


def _read_status(run: Path, problems: list[str]) -> dict[str, Any]:
    if not os.path.lexists(run / STATUS):
        return {}
    status = _attempt(problems, lambda: read_json(run / STATUS)) or {}
    if status and status.get("status") not in _STATUSES:
        problems.append(f"{STATUS}: invalid status {status.get('status')!r:.40}")
        return {}
    return status


def _is_it_running(run: RunSummary) -> RunSummary:
    """Return the summary of a run whose status is running, after a look at its lock."""
    if (held := _is_locked(run.path)) is True:
        return run
    # Locks of another machine may not be seen here, although the files are.
    if held is None or run.host not in (None, socket.gethostname()):
        where = f"on {run.host}" if run.host else "somewhere"
        return replace(
            run,
            status="unknown",
            message=f"it says that it runs {where}; look there, or at its age",
        )
    if run.checkpoint_step is None:
        message = "its process was killed before the first checkpoint; run the same command again"
    else:
        message = f"its process was killed; go on with: minigpt resume {run.path}"
    return replace(run, status="killed", message=message)


def _is_locked(run: Path) -> bool | None:
    """Return whether a process holds the run's lock; None if that can't be seen.

    The lock is taken for a moment if it is free, and shared, so that this disturbs nobody but a
    process that starts in this very moment.
    """
    try:
        descriptor = os.open(run / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a disk without locks
            return None
    return False


def _attempt(problems: list[str], read: Callable[[], T]) -> T | None:
    """Return what ``read`` returns; None and a line more in ``problems`` if it fails."""
    try:
        return read()
    except UserError as error:
        problems.append(": ".join(line.strip() for line in str(error).splitlines()))
    except OSError as error:
        problems.append(f"{error.filename}: can't be read: {error.strerror}")
    return None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and type(value) is int and 0 <= value < _MOST else None


def _number(value: object) -> float | None:
    if isinstance(value, int | float) and type(value) is not bool and abs(value) < _MOST:
        return float(value)
    return None  # also for nan and infinity


def _seconds_since_1970(when: object) -> float | None:
    """Return the time in status.json as a number."""
    try:
        return datetime.strptime(str(when), "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except (ValueError, OverflowError):
        return None


def _greatest(values: list[object]) -> float | None:
    return max((each for each in map(_number, values) if each is not None), default=None)
