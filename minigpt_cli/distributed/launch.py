"""``--nproc``: start a command as several worker processes on this machine, and end as they ended.

The launcher imports no torch. It starts a process per rank, passes signals on, and merges exit
codes. It holds no connection to the workers: what they agree about, they agree among themselves.
"""

import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from minigpt_cli.core.console import error_line
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.signals import SIGNALS, ignore_signals
from minigpt_cli.core.status import read_status, status_name, write_status
from minigpt_cli.distributed.exit_status import (
    DONE,
    ExitStatus,
    exit_status,
    merge_exit_status,
    report_order,
    resume_hint,
)
from minigpt_cli.distributed.join import LAUNCHER_PID, STORE_FD
from minigpt_cli.distributed.rank_info import LOOPBACK

# A second signal within these seconds is taken for the first one's echo. Later it is passed on: the
# first may have got lost in a worker, and workers that are saving ignore it.
ECHO_SECONDS = 5.0


@dataclass(frozen=True)
class Timeouts:
    """Seconds that the launcher waits for workers."""

    saved: float = 300  # for the others, once one has stopped and saved
    failed: float = 10  # for the others, once one has failed: they fail by themselves, or hang
    terminated: float = 20  # after that, between SIGTERM and SIGKILL


def launch(arguments: list[str], *, nproc: int, run: Path | None) -> int:
    """Run ``python -m minigpt_cli ARGUMENTS`` as ``nproc`` ranks on this machine.

    Call it in the main thread. The workers inherit the environment, standard output and standard
    error. SIGTERM, SIGINT, SIGHUP and SIGUSR1 are passed on to them; they save, however long it
    takes, and exit with 75 (130 after SIGINT).

    Args:
        run: the run directory. If a worker was killed, its status.json says so. None if the
            command makes no run.

    Returns:
        The exit code of the command: 0 if all workers returned 0; the code of the first worker that
        failed (1 if a signal killed it, with one line on standard error); 75 or 130 if the workers
        were stopped and none failed.
    """
    python = [sys.executable]
    if not {"", os.getcwd()} & set(sys.path):
        python.append("-P")  # nor may the workers import from the working directory
    return launch_command([*python, "-m", "minigpt_cli", *arguments], nproc=nproc, run=run)


def launch_command(
    command: list[str], *, nproc: int, run: Path | None, timeouts: Timeouts | None = None
) -> int:
    """Do what ``launch`` does for any command whose processes call ``follow_launcher``."""
    signals: list[int] = []
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # under nohup, or in the background
            signal.signal(signum, lambda number, _: signals.append(number))
    workers: list[subprocess.Popen[bytes]] = []
    # Workers start with signals blocked: one that comes before they handle signals has to wait.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        _start(command, nproc, workers)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        status = _wait(workers, signals, timeouts or Timeouts(), run)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        _kill(workers)
    ignore_signals()
    if status.message:
        error_line(status.message)
    if status.failed and run is not None:
        _record_failure(run, workers, status)
    return status.code


def _start(command: list[str], nproc: int, workers: list[subprocess.Popen[bytes]]) -> None:
    """Start the ranks into ``workers``, each in a session of its own: Ctrl-C in a terminal reaches
    only the launcher.

    Rank 0 inherits the listening socket of the store. No other process could have taken the port,
    and only this machine reaches it.
    """
    with socket.create_server((LOOPBACK, 0), backlog=socket.SOMAXCONN) as listener:
        everyone = os.environ | {
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(listener.getsockname()[1]),
            LAUNCHER_PID: str(os.getpid()),
        }
        for rank in range(nproc):
            env = everyone | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            inherited = [listener.fileno()] if rank == 0 else []
            if rank == 0:
                env[STORE_FD] = str(listener.fileno())
            try:
                workers.append(
                    subprocess.Popen(command, env=env, pass_fds=inherited, start_new_session=True)
                )
            except OSError as error:
                raise UserError(f"can't start rank {rank} of {nproc}: {error.strerror}") from None


def _wait(
    workers: list[subprocess.Popen[bytes]], signals: list[int], timeouts: Timeouts, run: Path | None
) -> ExitStatus:
    """Wait until all workers have ended; pass ``signals`` on as they come.

    As long as all run, or end with 0, this takes as long as it takes. Once one has stopped or
    failed, the others have ``timeouts``; then they get SIGTERM, and then they are killed.
    """
    running = dict(enumerate(workers))
    known = timed = DONE
    passed_on = 0
    echoes_until = -math.inf
    terminate_at = kill_at = give_up_at = math.inf
    while running and time.monotonic() < give_up_at:
        time.sleep(0.1)
        while passed_on < len(signals):
            if time.monotonic() >= echoes_until:
                echoes_until = time.monotonic() + ECHO_SECONDS
                _send(workers, signals[passed_on])
            passed_on += 1
        codes = {rank: worker.poll() for rank, worker in running.items()}
        ended = {rank: code for rank, code in codes.items() if code is not None}
        running = {rank: running[rank] for rank in running.keys() - ended.keys()}
        statuses = [exit_status(f"rank {rank}", code, run) for rank, code in ended.items()]
        for status in sorted(statuses, key=report_order):
            known = merge_exit_status(known, status)
        now = time.monotonic()
        if timed == DONE != known or known.failed > timed.failed:
            timed = known
            terminate_at = now + (timeouts.failed if known.failed else timeouts.saved)
            kill_at = terminate_at + timeouts.terminated
        if now > terminate_at:
            terminate_at = math.inf
            _send(workers, signal.SIGTERM)
        if now > kill_at and running:
            kill_at = math.inf
            give_up_at = now + timeouts.terminated  # one that hangs in the kernel can't be killed
            _kill(workers)
            left = ", ".join(f"rank {rank}" for rank in sorted(running))
            message = f"{left} did not end with the others and was killed; {resume_hint(run)}"
            known = timed = merge_exit_status(known, ExitStatus(1, message))
    return known


def _send(workers: list[subprocess.Popen[bytes]], signum: int) -> None:
    for worker in workers:
        worker.send_signal(signum)


def _kill(workers: list[subprocess.Popen[bytes]]) -> None:
    """Kill the workers that still run, and what they have started: each leads a process group."""
    for worker in workers:
        if worker.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.pid, signal.SIGKILL)


def _record_failure(run: Path, workers: list[subprocess.Popen[bytes]], status: ExitStatus) -> None:
    """Write to status.json what its last writer, the workers' rank 0, doesn't know.

    A file that another process has written is left alone: that one trains in the directory.
    """
    last = read_status(run)
    is_ours = last.get("pid") in [worker.pid for worker in workers]
    if not is_ours or last.get("host") != socket.gethostname():
        return
    if status.message or last.get("status") == "running":
        message = status.message or f"all ranks have ended; {resume_hint(run)}"
        write_status(run, status_name(status.code), status.code, last.get("step"), message)
