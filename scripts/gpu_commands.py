"""Commands that gpu_check.py runs, each with a time limit and its standard error in a file."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Finished:
    """A command that has ended.

    Attributes:
        code: its exit code; -9: it was killed at the deadline.
        output: what it printed.
        last_error: the last line of its standard error.
        seconds: how long it took.
    """

    code: int
    output: str
    last_error: str
    seconds: float

    @property
    def result(self) -> dict[str, Any]:
        """The last line of its output if that is JSON; else how it ended."""
        ended: dict[str, Any] = {"exit_code": self.code, "seconds": round(self.seconds, 1)}
        if self.code:
            ended["last_error"] = self.last_error[:500]
        last = (self.output.splitlines() or [""])[-1]
        if not self.code and last.startswith("{"):
            ended["result"] = json.loads(last)
        return ended


@dataclass(frozen=True)
class Check:
    """What the parts work with.

    Attributes:
        folder: a temporary directory.
        errors: gets the standard error of all commands.
        small: tiny sizes, to try the script itself.
        cudnn: whether torch may take cuDNN's attention.
        deadline: ``time.monotonic`` at which the part must have ended.
        results: what the parts before it have found.
    """

    folder: Path
    errors: IO[bytes]
    small: bool
    cudnn: bool
    deadline: float
    results: dict[str, Any]

    def start(self, *command: object, **variables: str) -> "subprocess.Popen[bytes]":
        """Start a command in a process group of its own."""
        words = list(map(str, command))
        self.errors.write(f"\n$ {' '.join(words)}\n".encode())
        self.errors.flush()
        return subprocess.Popen(
            words, cwd=ROOT, env=os.environ | variables, stdout=subprocess.PIPE,
            stderr=self.errors, start_new_session=True,
        )  # fmt: skip

    def run(self, *command: object, **variables: str) -> Finished:
        """Run a command to its end, or kill it and its children at the deadline."""
        began, before = time.monotonic(), self.errors.tell()
        process = self.start(*command, **variables)
        try:
            output, _ = process.communicate(timeout=max(1.0, self.deadline - began))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        text = output.decode(errors="replace")
        said = Path(self.errors.name).read_bytes()[before:].decode(errors="replace").splitlines()
        return Finished(process.returncode, text, said[-1], time.monotonic() - began)

    def python(self, *arguments: object, **variables: str) -> Finished:
        """Run this Python."""
        return self.run(sys.executable, *arguments, **variables)

    def minigpt(self, *arguments: object, **variables: str) -> Finished:
        """Run a command of minigpt."""
        return self.python("-m", "minigpt_cli", *arguments, **variables)


Part = Callable[[Check], Iterator[tuple[str, dict[str, Any]]]]
