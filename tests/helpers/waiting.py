"""Wait for a condition, never for a length of time."""

import subprocess
import time
from collections.abc import Callable
from typing import Any, Protocol


class _Process(Protocol):
    """A process of tests/helpers/processes.py."""

    @property
    def code(self) -> int | None: ...

    @property
    def tail(self) -> str: ...


def wait_until(
    condition: Callable[[], object],
    *processes: "_Process | subprocess.Popen[Any]",
    seconds: float = 120,
    explain: Callable[[], str] = lambda: "",
) -> bool:
    """Wait for a condition, or for the end of one of the processes.

    Args:
        seconds: give up after so long; a busy machine is slow.
        explain: what to say then.

    Returns:
        Whether the condition came true.

    Raises:
        AssertionError: neither comes.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if any(_has_ended(process) for process in processes):
            return bool(condition())
        assert time.monotonic() < deadline, "\n".join([explain(), *map(_tail, processes)])
        time.sleep(0.001)
    return True


def _has_ended(process: "_Process | subprocess.Popen[Any]") -> bool:
    if isinstance(process, subprocess.Popen):
        return process.poll() is not None
    return process.code is not None


def _tail(process: "_Process | subprocess.Popen[Any]") -> str:
    return "" if isinstance(process, subprocess.Popen) else process.tail
