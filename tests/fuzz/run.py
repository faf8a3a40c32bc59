"""Run one command in a forked child with limits, and say how it ended."""

import contextlib
import faulthandler
import os
import re
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

CPU_SECONDS, WALL_SECONDS, IDLE_SECONDS = 20, 120, 10  # idle: nobody in its family computes
MEMORY_BYTES = 1 << 30  # beyond what the parent has imported
FILE_BYTES = 256 << 20
CODES = {0, 2, 3, 4, 75, 130}
LONGEST_LINE = 1000  # characters
_BUGS = ("Traceback (most recent", "internal error", "panicked at")

OUTCOMES = ("handled", "traceback", "hang", "memory", "deceived", "unclear", "outside")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        code: the exit code; minus the signal's number if one ended it.
        limit: "hang" or "memory" if a limit ended it.
        seconds: of wall time.
    """

    code: int
    limit: str | None
    seconds: float
    output: str
    errors: str


def run_command(arguments: list[str], environment: dict[str, str], log: Path) -> Ended:
    """Run a command in this process's working directory.

    Args:
        environment: all of it.
        log: a directory for what the command prints.
    """
    streams = [log / name for name in ("output", "errors")]
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _become_command(arguments, environment, streams)
    limit = _watch(pid, lambda: _is_at_work(*(_text(stream) for stream in streams)))
    if limit is not None:
        os.kill(pid, signal.SIGUSR2)  # prints where it is
        time.sleep(0.3)
        for each in _family(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # what it started
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGXCPU:
        limit = "hang"
    return Ended(code, limit, time.monotonic() - began, *(_text(stream) for stream in streams))


def _text(stream: Path) -> str:
    return stream.read_bytes().decode(errors="backslashreplace")


def _is_at_work(output: str, errors: str) -> bool:
    """Whether a command trains or samples, which may rightly take for ever."""
    return (
        bool(output) or re.search(r"^(step \d+/|[\d,]+ steps of)", errors, re.MULTILINE) is not None
    )


def _watch(pid: int, is_at_work: Callable[[], bool]) -> str | None:
    """Wait for the process's end; return the limit that it passes before.

    A long training or sampling is told to stop after some time; that it must do.
    """
    descriptor = os.pidfd_open(pid)
    began = busy = time.monotonic()
    told = False
    cpu, memory = -1, _resident(os.getpid()) + MEMORY_BYTES
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    try:
        while not poll.poll(20):
            now = time.monotonic()
            if _resident(pid) > memory:
                return "memory"
            used = sum(map(_ticks, _family(pid)))
            if used != cpu:
                cpu, busy = used, now
            if not told and cpu > CPU_SECONDS / 8 * os.sysconf("SC_CLK_TCK"):
                told = True
                if is_at_work():
                    os.kill(pid, signal.SIGTERM)
            if now > began + WALL_SECONDS or now > busy + IDLE_SECONDS:
                return "hang"
    finally:
        os.close(descriptor)
    return None


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def _family(pid: int) -> list[int]:
    """The process and all that it started, as long as their parents live."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, task.read_text().split())
    return found


def _ticks(pid: int) -> int:
    """CPU time of a process and of those that it has waited for."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        return sum(map(int, fields[11:15]))
    return 0


def _become_command(
    arguments: list[str], environment: dict[str, str], streams: list[Path]
) -> NoReturn:
    """Be ``minigpt ARGUMENTS`` from here on."""
    code = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDONLY)
        files = [
            os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND) for file in streams
        ]
        for descriptor, standard in zip([null, *files], range(3), strict=True):
            os.dup2(descriptor, standard)
        os.closerange(3, 64)
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(
                signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
            )
        faulthandler.enable()
        faulthandler.register(signal.SIGUSR2)
        faulthandler.register(signal.SIGXCPU, chain=True)
        address_space = (
            int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        )
        resource.setrlimit(resource.RLIMIT_AS, (address_space + 8 * MEMORY_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ.clear()
        for name, value in environment.items():
            os.environ[name] = value
        sys.argv = ["minigpt", *arguments]
        code = _main()
        if modules := environment.get("FUZZ_MODULES"):
            Path(modules).write_text("\n".join(sys.modules))
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _main() -> int:
    from minigpt_cli import __main__
    from minigpt_cli.distributed import join
    from minigpt_cli.prepare import encode

    join._CONNECT_SECONDS = join._ARRIVE_SECONDS = (
        1.0  # else a lost rank is an error after 40 and 600 s
    )
    encode._start = _start_encoder  # a fork instead of a fresh interpreter: 0.01 s instead of 0.5
    if number := os.environ.get("FUZZ_KILL_AT_JOURNAL"):
        _kill_at_journal(int(number))
    try:
        __main__.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _kill_at_journal(number: int) -> None:
    """Have the tokenization killed after it has written its journal so often."""
    from minigpt_cli.prepare import pipeline

    write = pipeline.write_journal
    written = []

    def write_and_die(*arguments: Any) -> None:
        write(*arguments)
        written.append(1)
        if len(written) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    pipeline.write_journal = write_and_die


class _Forked:
    """What ``encode`` needs of the process of an encoder."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        with contextlib.suppress(ChildProcessError):
            return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return -signal.SIGKILL


def _start_encoder(tokenizer: Path, eos: int, dtype: str) -> tuple[Any, Connection]:
    from minigpt_cli.prepare import encode

    ours, theirs = Pipe()
    with theirs:
        pid = os.fork()
        if pid == 0:
            ours.close()
            encode._serve(theirs, str(tokenizer), eos, dtype)
            os._exit(0)
    return _Forked(pid), ours


def outcome(ended: Ended) -> tuple[str, str]:
    """Return one of ``OUTCOMES``, and what is wrong where it isn't "handled"."""
    if ended.limit is not None:
        return ended.limit, signature(ended.errors)
    if ended.code not in CODES or any(sign in ended.errors for sign in _BUGS):
        return "traceback", signature(ended.errors)
    lines = ended.errors.removesuffix("\n").split("\n")
    if not all(line.isprintable() for line in lines):
        return "unclear", "control characters in a message"
    if ended.code == 0:
        return "handled", ""
    told = [number for number, line in enumerate(lines) if line.startswith("minigpt: ")]
    if len(told) != 1:
        return "unclear", f"{len(told)} lines of errors"
    if not all(line.startswith("  ") for line in lines[told[0] + 1 :]):  # a recipe's problems
        return "unclear", "further lines after the error"
    if max(map(len, lines)) > LONGEST_LINE:
        return "unclear", f"a line of more than {LONGEST_LINE:,} characters"
    return "handled", ""


def signature(errors: str) -> str:
    """Return where an error is: the innermost frame of minigpt's, and the error's type."""
    frames = re.findall(r'File ".*/(minigpt_cli/[^"]*)", line (\d+)', errors)
    frames = [":".join(frame) for frame in frames if "cli.py" not in frame[0]] or ["?"]
    if "most recent call first" in errors:  # faulthandler's
        return frames[0]
    types = re.findall(r"^([\w.]+(?:Error|Exception|Interrupt)\b)", errors, re.MULTILINE)
    return f"{frames[-1]}: {types[-1] if types else 'no error'}"
