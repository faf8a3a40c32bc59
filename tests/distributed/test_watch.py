"""A worker whose launcher is gone: real processes, really killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.processes import environment

FOLLOW = "from minigpt_cli.distributed.watch import follow_launcher; follow_launcher()\n"
STAY = "import time\nwhile True: time.sleep(0.1)\n"


def start(code: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment() | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def gone(process: int) -> bool:
    try:
        return "Z" in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True


def wait_until_gone(process: int) -> None:
    deadline = time.monotonic() + 20
    while not gone(process):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_gets_sigterm_when_its_launcher_was_killed(tmp_path: Path):
    worker = (
        "import os, signal, sys\n"
        f"def save(*_): open({str(tmp_path / 'saved')!r}, 'w').close(); sys.exit(75)\n"
        f"signal.signal(signal.SIGTERM, save)\n{FOLLOW}print(os.getpid(), flush=True)\n{STAY}"
    )
    launcher = start(
        "import os, subprocess, sys\nos.environ['MINIGPT_LAUNCHER_PID'] = str(os.getpid())\n"
        f"subprocess.run([sys.executable, '-c', {worker!r}])"
    )
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    assert not gone(pid)
    launcher.kill()
    wait_until_gone(pid)
    assert (tmp_path / "saved").exists()
    launcher.communicate()


def test_a_worker_whose_launcher_had_gone_before_it_looked_ends_too():
    process = start(f"{FOLLOW}{STAY}", MINIGPT_LAUNCHER_PID=str(2**22 + 1))  # above any process
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (-signal.SIGTERM, "")


def test_a_worker_that_does_not_heed_the_signal_ends_the_hard_way():
    process = start(
        "import signal; from minigpt_cli.distributed.watch import follow_parent\n"
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN); follow_parent(1 << 30, 0.2)\n{STAY}"
    )
    process.communicate(timeout=20)
    assert process.returncode == 75


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_that_came_before_the_worker_was_ready_waits_and_leaves_no_traceback(
    signum: signal.Signals,
):
    code = f"import os, sys; sys.stdin.read()\n{FOLLOW}os.kill(os.getpid(), 0)\n{STAY}"
    process = subprocess.Popen(
        [sys.executable, "-c", code], text=True, stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment() | {"MINIGPT_LAUNCHER_PID": str(os.getpid())},
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signum}),
    )  # fmt: skip
    process.send_signal(signum)
    assert process.poll() is None
    _, errors = process.communicate("go", timeout=20)
    assert (process.returncode, errors) == (-signum, "")


def test_other_processes_follow_nobody_and_a_workers_own_children_do_not_either():
    shown = "import os, signal; print(os.environ.get('MINIGPT_LAUNCHER_PID'), threading.enumerate()"
    code = f"import threading\n{FOLLOW}{shown}, signal.getsignal(2))"
    output, _ = start(code).communicate()
    assert "default_int_handler" in output
    assert "follow-parent" not in output
    output, _ = start(code, MINIGPT_LAUNCHER_PID=str(os.getpid())).communicate()
    assert output.startswith("None ")
    assert "follow-parent" in output


def test_it_comes_before_torch():
    loaded = "import sys; print('torch' in sys.modules, 'typer' in sys.modules)"
    assert start(f"{FOLLOW}{loaded}").communicate()[0] == "False False\n"
