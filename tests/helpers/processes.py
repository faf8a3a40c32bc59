"""minigpt as real processes: fresh ones, and cheap ones, forked where torch is imported.

A fork costs 0.1 s where a fresh process takes 3 s to import torch; it is a process of its own all
the same, with its own threads, files and locks, and SIGKILL ends it as any other.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"
NOBODY = 65534
MARK = "MINIGPT_FAULTS"
"""Environment variable, by which a process's whole family is found."""

_IMPORTED = [
    "encodings.utf_8_sig", "minigpt_cli.cli", "minigpt_cli.commands.loading",
    "minigpt_cli.evaluate.loss", "minigpt_cli.generate.text", "minigpt_cli.huggingface.export",
    "minigpt_cli.distributed.launch", "minigpt_cli.train.loop", "minigpt_cli.prepare.from_recipe",
    "minigpt_cli.train.start", "minigpt_cli.core.status",
    "minigpt_cli.report.figure", "minigpt_cli.report.page", "numpy.ctypeslib", "numpy.ma",
    "pydantic.types", "pytest", "rich.status", "safetensors.torch", "tokenizers", "torch._dynamo",
    "torch._inductor.standalone_compile", "torch._numpy", "torch.onnx",
    "transformers.models.auto", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3",
    "typer._adapters",
]  # fmt: skip

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(_IMPORTED)


def heed_signals() -> None:
    """Heed the signals that are ignored under nohup or in the background; children inherit that."""
    for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        if signal.getsignal(signum) is signal.SIG_IGN:
            usual = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
            signal.signal(signum, usual)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "minigpt_cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    """One thread, as forked processes have: so that runs of both kinds are the same to the bit."""
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def minigpt(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a forked process."""
    with tempfile.TemporaryDirectory() as folder:
        log, output = Path(folder) / "errors", Path(folder) / "output"
        code = fork(log, *arguments, output=output, cwd=cwd or Path.cwd()).wait(300)
        return subprocess.CompletedProcess(
            command(*arguments), code, output.read_text(), log.read_text()
        )


@dataclass
class Process:
    """A command that was started, and what it says."""

    process: "subprocess.Popen[bytes] | BaseProcess"
    log: Path  # its standard error, and its output if that went nowhere else
    mark: str
    pid: int = field(init=False)

    def __post_init__(self) -> None:
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def code(self) -> int | None:
        """The exit code, minus the signal's number where one killed it; None while it runs."""
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll()
        return self.process.exitcode

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def tail(self) -> str:
        """The end of it, for messages."""
        return f"exit code {self.code}; " + "\n".join(self.said.splitlines()[-12:])

    def stacks(self) -> str:
        """Where each thread of a forked process stands, after what it has said.

        First as the kernel sees it: one in state D waits for a disk, and not even SIGKILL ends it;
        until it does end, its connections stay open, and other ranks don't notice.
        """
        threads = "; ".join(_threads(self.pid))
        if not isinstance(self.process, subprocess.Popen):
            self.send(signal.SIGUSR2)  # see _run
            time.sleep(1)
        return f"exit code {self.code}, threads: {threads}\n{self.said[-8000:]}"

    def send(self, signum: int) -> None:
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The process stands still meanwhile."""
        self.send(signal.SIGSTOP)
        try:
            yield
        finally:
            self.send(signal.SIGCONT)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def kill_all(self) -> None:
        """The process and all that it started, as when a machine goes down."""
        for pid in family(self):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait(self, seconds: float = 120) -> int:
        """The exit code; it must end in time, and with it all that it started.

        Raises:
            AssertionError: it didn't.
        """
        deadline = time.monotonic() + seconds
        while (code := self.code) is None:
            assert time.monotonic() < deadline, f"it runs after {seconds} s:\n{self.stacks()}"
            time.sleep(0.002)
        while left := family(self):
            assert time.monotonic() < deadline, f"{len(left)} orphans are left:\n{self.tail}"
            time.sleep(0.02)
        return code


def fresh(log: Path, *arguments: object, **variables: str) -> Process:
    """``python -m minigpt_cli ARGUMENTS``, from its first import on."""
    mark = uuid.uuid4().hex
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command(*arguments), cwd=log.parent, stdout=stream, stderr=stream,
            env=_environment(mark) | variables, start_new_session=True,
        )  # fmt: skip
    return Process(process, log, mark)


def fork(
    log: Path,
    *arguments: object,
    output: Path | None = None,
    cwd: Path | None = None,
    user: int | None = None,
    **variables: str,
) -> Process:
    """The same as a process that has imported everything already.

    Args:
        output: where its standard output goes, if not to the log.
        cwd: its working directory; by default the log's.
        user: whom it runs as; this user can't if not root.
    """
    mark = uuid.uuid4().hex
    process = _forks.Process(
        target=_run,
        args=(
            log,
            output or log,
            cwd or log.parent,
            list(map(str, arguments)),
            _environment(mark) | variables,
            user,
        ),
    )
    before = dict(os.environ)
    os.environ.update(_environment(""))  # for the first call, which imports everything
    try:
        process.start()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return Process(process, log, mark)


def _environment(mark: str) -> dict[str, str]:
    return environment() | {MARK: mark}


def _run(
    log: Path,
    output: Path,
    cwd: Path,
    arguments: list[str],
    variables: dict[str, str],
    user: int | None,
) -> None:
    os.setsid()
    os.environ.update(variables)
    os.chdir(cwd)
    for standard, file in ((1, output), (2, log)):
        # Ctrl-C reaches the process only if its terminal is open for reading.
        mode = os.O_RDWR if file.is_relative_to("/dev/pts") else os.O_WRONLY
        stream = os.open(file, mode | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(stream, standard)
    faulthandler.register(signal.SIGUSR2)
    if user is not None and os.geteuid() == 0:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    sys.argv = ["minigpt", *arguments]
    from minigpt_cli import cli

    cli.main()


def family(process: Process) -> list[int]:
    """The processes that live of those which this one is or started, at whatever remove."""
    mark = f"{MARK}={process.mark}".encode()
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError):
            state, _, _, session = _stat(int(entry))[:4]
            inherited = mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            if state not in "ZX" and (int(session) == process.pid or inherited):
                found.append(int(entry))
    return found


def _stat(pid: int) -> list[str]:
    """State, parent, process group, session, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def _threads(pid: int) -> list[str]:
    """Each thread's state and where in the kernel it waits."""
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError):
            state = (task / "stat").read_text().rpartition(") ")[2][0]
            found.append(f"{state} {(task / 'wchan').read_text()}")
    return found


def ranks(launcher: Process) -> dict[int, int]:
    """Rank -> process id of the workers that ``--nproc`` has started."""
    found = {}
    for pid in family(launcher):
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                name, _, value = entry.partition(b"=")
                if name == b"RANK" and int(_stat(pid)[1]) == launcher.pid:
                    found[int(value)] = pid
    return found


def handles(pid: int, signum: int) -> bool:
    """Whether the process has a handler of its own for this signal."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("SigCgt:"):
                return bool(int(line.split()[1], 16) >> (signum - 1) & 1)
    return False


def has_mapped(pid: int, library: str) -> bool:
    with contextlib.suppress(OSError):
        return library in Path(f"/proc/{pid}/maps").read_text()
    return False
