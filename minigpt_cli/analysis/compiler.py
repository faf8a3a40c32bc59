"""Whether torch.compile works: a small function is compiled in a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from minigpt_cli.analysis.finding import Finding, pip_install, system_install
from minigpt_cli.core.files import os_reason

SECONDS = 120  # a compiler that takes longer is of no use, or hangs
_PURPOSE = "[precision] compile"
_CODE = """
import sys, torch
device = "cuda" if torch.cuda.is_available() else "cpu"
try:
    torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
except Exception as error:
    sys.exit(str(error)[-20_000:] or type(error).__name__)
"""


@dataclass(frozen=True)
class CompileTrial:
    """A compilation on its way: its process, and the directory of its results."""

    process: "subprocess.Popen[str]"
    folder: Path


@contextlib.contextmanager
def trial_compilation() -> Iterator[CompileTrial | OSError]:
    """Start a compilation; it and its files are gone when the ``with`` block ends.

    Yields:
        The compilation, for ``compiler_finding``; or why it could not be started.
    """
    with contextlib.ExitStack() as resources:
        try:
            # A compiler that is being killed may still write.
            place = tempfile.TemporaryDirectory(
                prefix="minigpt-doctor-", ignore_cleanup_errors=True
            )
            folder = resources.enter_context(place)
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                cwd=folder,
                env=os.environ | {
                    "TORCHINDUCTOR_CACHE_DIR": folder,  # an earlier result would hide a problem
                    "TRITON_CACHE_DIR": folder,
                    "TMPDIR": folder,
                    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # no pool of processes
                    "TORCHINDUCTOR_VEC_ISA_OK": "1",  # half the time: vector units aren't tried
                },
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            yield error
            return
        resources.callback(_end, process)
        yield CompileTrial(process, Path(folder))


def compiler_finding(trial: CompileTrial | OSError, seconds: float = SECONDS) -> Finding:
    """Wait for the compilation, at most so many seconds."""
    if isinstance(trial, OSError):
        found = f"not tried: {os_reason(trial)} ({trial.filename or 'temporary files'})"
        return Finding("compiler", found, _PURPOSE, "lacks", "export TMPDIR=DIR")
    try:
        _, said = trial.process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        found = f"torch.compile took longer than {seconds:g} s"
        return Finding("compiler", found, _PURPOSE, "lacks")
    if trial.process.returncode:
        found, mend = _explain(said, trial.process.returncode)
        return Finding("compiler", found, _PURPOSE, "lacks", mend)
    if not any(trial.folder.rglob("*.*")):
        switches = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")
        found, mend = "torch.compile compiles nothing", ""
        if names := [name for name in switches if os.environ.get(name)]:
            found, mend = f"{found}: {' and '.join(names)} is set", f"unset {' '.join(names)}"
        return Finding("compiler", found, _PURPOSE, "lacks", mend)
    return Finding("compiler", "torch.compile works", _PURPOSE)


def _explain(said: str, code: int) -> tuple[str, str]:
    """Return what went wrong, and the command that mends it."""
    if "No working C++ compiler" in said or "Failed to find C compiler" in said:
        return "torch.compile finds no C++ compiler", system_install("g++", "gcc-c++")
    if "Python.h" in said:
        return "torch.compile finds no Python.h", system_install("python3-dev", "python3-devel")
    if "working triton installation" in said or "No module named 'triton'" in said:
        return "torch.compile finds no triton", pip_install("triton")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    first = lines[0] if lines else f"exit code {code}"
    reason = next((line for line in lines if "error:" in line), first)
    return f"torch.compile fails: {reason[:200]}", ""


def _end(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stderr is not None:
        process.stderr.close()
