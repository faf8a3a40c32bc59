"""Run what a received file asks for in one child process, within limits of time and memory.

A chat template is a program, and the patterns of a tokenizer may take for ever. Here such a thing
can end a child, not the command. The kernel holds the limits, so they hold inside C and Rust too:
CPU time, because it doesn't depend on the machine's other work, and address space.

A request and its answer are one line of JSON each. The child ends when its input does.
"""

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.core.signals import ignore_signals

SECONDS = 10  # of CPU time for one request, and more for a long text
MEMORY = 2 << 30  # bytes of address space for one request, and more for a long text
_SECONDS_PER_BYTE = 1e-5
_SHOWN = 300  # characters of an error's message
_ADVICE = "use another tokenizer or chat template"

_children: dict[int, "subprocess.Popen[bytes]"] = {}  # by the parent's id: a fork has none yet
_lock = threading.Lock()


class Refusal(UserError):
    """The file's program works, and refuses this input."""


class NotLoaded(Exception):
    """The child doesn't have what a request names."""


class _Died(Exception):
    """The child ended before it answered, with this exit code."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


def start_child(module: str) -> "subprocess.Popen[bytes]":
    """Start this process's child, or return it: the earlier it starts, the sooner it answers.

    Args:
        module: What it runs; it calls ``serve``.
    """
    child = _children.get(os.getpid())
    if child is None:
        child = subprocess.Popen(
            # -P: the working directory may hold a file of a module's name.
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Rust's panics print pages
            env=child_environment(),
            start_new_session=True,  # Ctrl-C reaches the parent alone
        )
        _children[os.getpid()] = child
    return child


def child_environment() -> dict[str, str]:
    """Return the environment in which a child finds this package and uses one core."""
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "TOKENIZERS_PARALLELISM": "false",
        # Libraries map some 40 MB for each thread, and with many cores they would reach the limit.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def ask(module: str, request: dict[str, Any], what: str, load: dict[str, Any] | None = None) -> Any:
    """Let the child answer a request.

    A child that died, but not at its limits, is started again, and the request is repeated once.

    Args:
        module: See ``start_child``.
        request: "do": the name of one of the child's functions; its arguments.
        what: The file that is tried, for messages.
        load: The request that must come first in a child that answers with ``NotLoaded``.

    Returns:
        The function's result.

    Raises:
        UserError: The function raised it, failed, or took too much time or memory.
        Refusal: The function raised it.
    """
    with _lock:
        try:
            answer = _answer_to(module, request, load)
        except _Died as death:
            if death.code in (-signal.SIGXCPU, -signal.SIGABRT):
                raise _unanswered(what, death.code) from None
            try:
                answer = _answer_to(module, request, load)
            except _Died as again:
                raise _unanswered(what, again.code) from None
    if "value" in answer:
        return answer["value"]
    if "failure" in answer:
        raise UserError(f"{what}: {answer['failure']}")
    raise (Refusal if answer["refused"] else UserError)(answer["error"])


def ending(code: int) -> str:
    """Return in a few words why a child with limits died."""
    if code == -signal.SIGXCPU:
        return f"takes more than {SECONDS} seconds of CPU time"
    if code == -signal.SIGABRT:  # Rust aborts where memory runs out
        return f"takes more than {MEMORY >> 30} GB of memory"
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL)"
    return f"crashes ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def _unanswered(what: str, code: int) -> UserError:
    if code == -signal.SIGKILL:  # by the system or an administrator, whatever the file
        return UserError(
            f"{what}: the process that runs it {ending(code)}, also at the second try; if memory "
            "ran out, free some and run the command again"
        )
    return UserError(f"{what}: {ending(code)}; {_ADVICE}")


def _answer_to(module: str, request: dict[str, Any], load: dict[str, Any] | None) -> dict[str, Any]:
    answer = _exchange(module, request)
    if load is not None and "not loaded" in answer:
        answer = _exchange(module, load)
        if "value" in answer:
            answer = _exchange(module, request)
    return answer


def _exchange(module: str, request: dict[str, Any]) -> dict[str, Any]:
    child = start_child(module)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # it has ended: there is no answer
            text = json.dumps(request | {"seconds": SECONDS}, default=str)
            child.stdin.write(text.encode() + b"\n")
            child.stdin.flush()
        line = child.stdout.readline()
    except BaseException:  # a signal: its answer must not be taken for the next one
        child.kill()
        _end(child)
        raise
    if not line.endswith(b"\n"):
        raise _Died(_end(child))
    answer: dict[str, Any] = json.loads(line)
    return answer


def _end(child: "subprocess.Popen[bytes]") -> int:
    """Forget a child that has ended, or that can't be used any more; return its exit code."""
    _children.pop(os.getpid(), None)
    for stream in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):  # an unwritten rest of a request
            if stream is not None:
                stream.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        return child.wait(10)  # it may have memory to give back
    child.kill()
    return child.wait()


# --- in the child ---------------------------------------------------------------------------------


def serve(functions: dict[str, Callable[..., Any]], memory_per_byte: dict[str, int]) -> None:
    """Answer requests until the parent has gone.

    Args:
        functions: Name -> what does it; the request's other values are its arguments.
        memory_per_byte: Name -> the memory that it may take beyond ``MEMORY``, for each byte of
            the request.
    """
    ignore_signals()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # prints of libraries
    for line in sys.stdin.buffer:
        request = json.loads(line)
        name = request.pop("do")
        limit_resources(len(line), memory_per_byte.get(name, 0), request.pop("seconds"))
        answers.write(_answer(functions[name], request) + b"\n")
        answers.flush()


def limit_resources(size: int, memory_per_byte: int, seconds: float = SECONDS) -> None:
    """Limit the CPU time and the memory that this process takes from now on.

    Args:
        size: Bytes of the input that it is about to work on.
        memory_per_byte: The memory that each of them may take beyond ``MEMORY``.
        seconds: The CPU time that it may take; a long input may take longer.
    """
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    until = time.process_time() + seconds + size * _SECONDS_PER_BYTE
    _limit(resource.RLIMIT_CPU, math.ceil(until))
    _limit(resource.RLIMIT_AS, _mapped() + MEMORY + size * memory_per_byte)
    _limit(resource.RLIMIT_CORE, 0)


def _mapped() -> int:
    """Return the bytes of address space that libraries, and what was loaded, take already."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:  # not Linux
        return 0
    return pages * resource.getpagesize()


def _limit(kind: int, value: int) -> None:
    most = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if most == resource.RLIM_INFINITY else min(value, most), most))


def _answer(function: Callable[..., Any], arguments: dict[str, Any]) -> bytes:
    answer: dict[str, Any]
    try:
        answer = {"value": function(**arguments)}
    except NotLoaded:
        answer = {"not loaded": True}
    except UserError as error:
        answer = {"error": str(error), "refused": isinstance(error, Refusal)}
    except BaseException as error:  # Rust's panics are no Exception
        answer = {"failure": failure(error)}
    return json.dumps(answer).encode()


def failure(error: BaseException) -> str:
    """Return what went wrong in a function with limits, in one line."""
    if isinstance(error, MemoryError):
        return f"takes more than {MEMORY >> 30} GB of memory; {_ADVICE}"
    if isinstance(error, RecursionError):
        return f"calls itself too deeply; {_ADVICE}"
    return first_line(error)[:_SHOWN]
