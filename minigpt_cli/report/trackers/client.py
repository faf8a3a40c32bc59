"""Trackers as the training process sees them: it writes rows to pipes, and never waits for them.

Each tracker works in a process of its own (process.py), which this starts.
"""

import contextlib
import importlib.util
import json
import os
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TypedDict

from minigpt_cli.core.child import child_environment
from minigpt_cli.core.console import log, warn
from minigpt_cli.core.errors import UserError, exit_code_of
from minigpt_cli.core.reading import build
from minigpt_cli.core.status import read_tracking, write_tracking
from minigpt_cli.recipe import Recipe, dump_recipe
from minigpt_cli.recipe.tables import to_tables
from minigpt_cli.report.trackers.process import SECONDS
from minigpt_cli.report.trackers.tracker import TrackedRun

_READY_SECONDS = 60  # to import a library
_STOP_SECONDS = 5  # to finish after a signal or an error: what stops a job may kill it soon
_MOST_PENDING = 16 << 20  # bytes that a tracker hasn't taken yet


class _Tracking(TypedDict):
    """What status.json keeps."""

    id: str
    part: int
    directory: str


class Trackers:
    """The trackers of a run, on rank 0; on other ranks none.

    Nothing here raises an error or takes time while training goes on: trouble is a warning.
    """

    def __init__(self) -> None:
        """Create a set without trackers."""
        self._links: list[_Link] = []
        self._run: TrackedRun | None = None

    def start(self, names: Sequence[str]) -> None:
        """Start the processes, and wait until each has imported its library.

        Raises:
            UserError: a library is not installed, or W&B has no login.
        """
        for name in names:
            found = importlib.util.find_spec(name)
            if found is None or found.origin is None:  # a directory of that name is no library
                raise UserError(f"[log] trackers: {name} is not installed: pip install {name}")
        self._links = [_Link(name) for name in names]
        deadline = time.monotonic() + _READY_SECONDS
        for link in self._links:
            link.wait_until_ready(deadline)

    def begin(
        self, recipe: Recipe, directory: Path, step: int, is_evaluated: bool, went_back: bool
    ) -> None:
        """Let the trackers go on after ``step``; they read the rows up to there themselves.

        Args:
            recipe: the resolved recipe.
            directory: the run directory; its metrics.jsonl has been cut back.
            step: where training goes on; 0 at its start.
            is_evaluated: whether the evaluation at ``step`` is kept.
            went_back: whether rows were dropped, which trackers know already.
        """
        if not self._links:
            return
        continues = not went_back and all(link.continues for link in self._links)
        tracking = _next_tracking(directory, continues)
        write_tracking(directory, dict(tracking))
        self._run = TrackedRun(
            directory=directory,
            name=directory.absolute().name,
            id=tracking["id"],
            part=tracking["part"],
            step=step,
            is_evaluated=is_evaluated,
            recipe=dump_recipe(recipe),
            settings=to_tables(recipe),
        )
        self._send_start(self._run)

    def go_back(self, step: int, is_evaluated: bool) -> None:
        """Make the trackers forget what came after ``step``; metrics.jsonl has been cut back."""
        if self._run is None:
            return
        tracking = _next_tracking(self._run.directory, continues=False)
        write_tracking(self._run.directory, dict(tracking))
        part = self._run.part + 1
        self._run = replace(self._run, part=part, step=step, is_evaluated=is_evaluated)
        self._send_start(self._run)

    def log(self, row: dict[str, Any]) -> None:
        """Send a line of metrics.jsonl or samples.jsonl."""
        for link in self._links:
            link.send({"row": row})

    def close(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        """Let the trackers finish; for an ``ExitStack``. Takes at most a minute."""
        seconds = SECONDS + 1 if error is None else _STOP_SECONDS
        deadline = time.monotonic() + seconds
        for link in self._links:
            link.send({"finish": 0 if error is None else exit_code_of(error)})
        for link in self._links:
            link.close(deadline)

    def _send_start(self, run: TrackedRun) -> None:
        for link in self._links:
            link.send({"start": asdict(run) | {"directory": str(run.directory)}})


class _Link:
    """A tracker's process, and the pipes to and from it.

    Attributes:
        continues: whether it can go on with the part of a run that an earlier process wrote.
    """

    def __init__(self, name: str):
        self._name = name
        self.continues = True
        self._is_ready = False
        self._pending = bytearray()
        self._answers = b""
        module = "minigpt_cli.report.trackers.process"
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            # -P: the working directory may hold a file of a module's name.
            [sys.executable, "-P", "-m", module, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries print much; errors come as answers
            env=child_environment(),
            start_new_session=True,  # Ctrl-C reaches the parent alone
        )
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)

    def wait_until_ready(self, deadline: float) -> None:
        """Wait until the library is imported.

        Raises:
            UserError: it can't be used.
        """
        while self._process is not None and not self._is_ready:
            if not self._wait(read=True, deadline=deadline):
                self._give_up(f"is not ready after {_READY_SECONDS} s")
            self._receive()

    def send(self, message: dict[str, Any]) -> None:
        """Write a message, or keep it for the next call where the pipe is full."""
        self._pending += json.dumps(message).encode() + b"\n"
        self._receive()
        self._write()
        if self._process is not None and len(self._pending) > _MOST_PENDING:
            self._give_up("takes no more rows")

    def close(self, deadline: float) -> None:
        """Write the rest, and wait for the process's end; it may go on by itself for a minute."""
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        try:
            while self._pending and self._wait(read=False, deadline=deadline):
                self._write()
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close()
        while self._process is not None and self._wait(read=True, deadline=deadline):
            self._receive(closing=True)
        if self._process is not None:
            warn(f"{self._name} has not finished; it goes on for at most {SECONDS} s by itself")

    def _write(self) -> None:
        if self._process is None:
            self._pending.clear()
            return
        assert self._process.stdin is not None
        try:
            while self._pending:
                written = os.write(self._process.stdin.fileno(), self._pending)
                del self._pending[:written]
        except BlockingIOError:
            pass
        except OSError:
            self._pending.clear()
            self._receive()  # its last answers, which say why it has ended

    def _receive(self, closing: bool = False) -> None:
        """Read and show its answers.

        Args:
            closing: whether its end is no surprise.
        """
        while self._process is not None:
            assert self._process.stdout is not None
            try:
                received = os.read(self._process.stdout.fileno(), 1 << 16)
            except BlockingIOError:
                return
            *lines, self._answers = (self._answers + received).split(b"\n")
            for line in lines:
                self._show(json.loads(line))
            if not received:
                process, self._process = self._process, None
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)  # its output ends with it
                if not closing or process.returncode:
                    self._warn(f"ended unexpectedly (exit code {process.returncode})")

    def _show(self, answer: dict[str, Any]) -> None:
        if "error" in answer:
            self._process = None
            raise UserError(f"[log] trackers: {answer['error']}")
        if "ready" in answer:
            self._is_ready, self.continues = True, answer["ready"]
        elif "message" in answer:
            log(f"{self._name}: {answer['message']}")
        else:
            warn(f"{self._name}: {answer['warning']}")

    def _give_up(self, reason: str) -> None:
        assert self._process is not None
        self._process.kill()
        self._process = None
        self._warn(reason)

    def _warn(self, reason: str) -> None:
        warn(f"{self._name} {reason}: training goes on without it")

    def _wait(self, *, read: bool, deadline: float) -> bool:
        """Return whether a pipe can be read or written before the deadline."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        poll = select.poll()
        if read:
            poll.register(self._process.stdout, select.POLLIN)
        else:
            poll.register(self._process.stdin, select.POLLOUT)
        return bool(poll.poll(1000 * max(0.0, deadline - time.monotonic())))


def _next_tracking(directory: Path, continues: bool) -> _Tracking:
    """Return the run's id, a new one in a copy of a run directory, and its part."""
    place = str(directory.resolve())
    try:
        tracking: _Tracking = build(_Tracking, read_tracking(directory))
        is_own = tracking["directory"] == place and tracking["id"].isalnum()
    except ValueError:
        is_own = False
    if not is_own or len(tracking["id"]) > 64:
        return {"id": secrets.token_hex(4), "part": 1, "directory": place}
    return tracking if continues else {**tracking, "part": tracking["part"] + 1}
