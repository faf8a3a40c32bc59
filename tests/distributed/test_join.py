"""How ranks meet, and what a worker does whose launcher is gone."""

import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from minigpt_cli.core.errors import UserError
from minigpt_cli.distributed import join
from minigpt_cli.distributed.failure import is_lost_rank
from minigpt_cli.distributed.join import connect
from minigpt_cli.distributed.rank_info import LOOPBACK, RankInfo
from tests.helpers.processes import command, environment
from tests.helpers.ranks import free_port, gone, rank_environment
from tests.helpers.waiting import wait_until

FOLLOW = "from minigpt_cli.distributed.join import follow_launcher; follow_launcher()\n"
STAY = "import time\nwhile True: time.sleep(0.1)\n"


def test_ranks_of_nproc_wait_long_for_rank_0(monkeypatch: pytest.MonkeyPatch):
    """It may take a minute to import torch on a busy machine."""
    monkeypatch.setattr(join, "_CONNECT_SECONDS", 0.5)
    monkeypatch.setattr(join, "_ARRIVE_SECONDS", 2)
    listener = socket.create_server((LOOPBACK, 0))
    rank1 = RankInfo(1, 2, 1, 2, LOOPBACK, listener.getsockname()[1])
    with pytest.raises(UserError, match="check MASTER_ADDR and MASTER_PORT"):
        connect(rank1)
    monkeypatch.setattr(join.session, "launched", True)
    with pytest.raises(UserError, match=r"where all ranks meet: [^;]*$"):
        connect(rank1)

    monkeypatch.setattr(join, "_ARRIVE_SECONDS", 60)

    def host() -> None:
        monkeypatch.setenv(join.STORE_FD, str(listener.detach()))
        stores.append(connect(replace(rank1, rank=0, local_rank=0)))

    stores: list[object] = []
    later = threading.Timer(1.5, host)
    later.start()
    connect(rank1).set("who", "rank 1")
    later.join()
    assert stores[0].get("who") == b"rank 1"


@pytest.mark.parametrize("port", [b"", b"abc", b"-1", b"65536", b"9" * 5000, b"\xff", b"7\x1b[2J"])
def test_a_false_port_in_the_store_of_torchrun(monkeypatch: pytest.MonkeyPatch, port: bytes):
    agent = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    agent.set("minigpt/port", port)
    monkeypatch.setattr(join, "_ARRIVE_SECONDS", 0.3)
    rank1 = RankInfo(1, 2, 1, 2, LOOPBACK, agent.port, agent_store=True)
    with pytest.raises(UserError, match="rank 0 has not come"):
        connect(rank1)


def test_a_false_count_of_ranks(monkeypatch: pytest.MonkeyPatch):
    store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    rank = RankInfo(1, 2, 1, 2, LOOPBACK, store.port)
    monkeypatch.setattr(join, "_ARRIVE_SECONDS", 0.3)
    with pytest.raises(UserError, match="only 1 of 2 ranks came"):
        join.wait_for_all(rank, store)
    store.set("minigpt/arrived", b"abc")
    monkeypatch.setattr(join.session, "info", rank)
    with pytest.raises(RuntimeError) as caught:
        join.wait_for_all(rank, store)
    assert is_lost_rank(caught.value)  # so it becomes one line


def test_a_false_address(monkeypatch: pytest.MonkeyPatch):
    """Others may have written it; the interface stays as it is."""
    store = TCPStore(LOOPBACK, 0, is_master=True, wait_for_workers=False)
    for false in (b"\xff\x00", b"", b"a" * 100_000, b"1.2.3", b"\x1b[2J"):
        store.set("minigpt/address/1", false)
        rank0 = RankInfo(0, 2, 0, 1, LOOPBACK, store.port)
        join.choose_interface(rank0, store)
    assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_no_such_host(tmp_path: Path):
    env = rank_environment(1, 2, free_port())
    env |= {"MASTER_ADDR": "no-such-host.invalid", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    done = subprocess.run(
        command("pretrain", "x.toml"), env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 2
    assert "can't reach no-such-host.invalid:" in done.stderr
    assert "MASTER_ADDR" in done.stderr


# --- a launcher that is gone ----------------------------------------------------------------------


def start(code: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment() | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("torchrun", [False, True])
def test_sigterm_when_the_launcher_was_killed(tmp_path: Path, torchrun: bool):
    variable = "'TORCHELASTIC_RUN_ID'] = 'x'" if torchrun else "'MINIGPT_LAUNCHER_PID'] = pid"
    worker = (
        "import os, signal, sys\n"
        f"def save(*_): open({str(tmp_path / 'saved')!r}, 'w').close(); sys.exit(75)\n"
        f"signal.signal(signal.SIGTERM, save)\n{FOLLOW}print(os.getpid(), flush=True)\n{STAY}"
    )
    launcher = start(
        f"import os, subprocess, sys\npid = str(os.getpid())\nos.environ[{variable}\n"
        f"subprocess.run([sys.executable, '-c', {worker!r}])"
    )
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    assert not gone(pid)
    launcher.kill()
    wait_until(lambda: gone(pid))
    assert (tmp_path / "saved").exists()
    launcher.communicate()


def test_a_launcher_that_was_gone_before(tmp_path: Path):
    process = start(f"{FOLLOW}{STAY}", MINIGPT_LAUNCHER_PID=str(2**22 + 1))  # above any process
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (-signal.SIGTERM, "")


def test_a_worker_that_ignores_the_signal():
    process = start(
        "import signal; from minigpt_cli.distributed.join import follow_parent\n"
        f"signal.signal(signal.SIGTERM, signal.SIG_IGN); follow_parent(1 << 30, 0.2)\n{STAY}"
    )
    process.communicate(timeout=120)
    assert process.returncode == 75


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_before_a_worker_handles_signals(signum: signal.Signals):
    """It waits, and leaves no traceback."""
    process = subprocess.Popen(
        command("verify", "."), text=True, stdin=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment() | {"MINIGPT_LAUNCHER_PID": str(os.getpid())},
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, {signum}),
    )  # fmt: skip
    process.send_signal(signum)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (130 if signum == signal.SIGINT else 75)
    assert errors == f"minigpt: stopped by {signum.name}; run the same command again to go on\n"


def test_only_workers_follow():
    shown = "import os, signal; print(os.environ.get('MINIGPT_LAUNCHER_PID'), threading.enumerate()"
    code = f"import threading\n{FOLLOW}{shown}, signal.getsignal(2))"
    output, _ = start(code).communicate()
    assert "default_int_handler" in output
    assert "follow-parent" not in output
    output, _ = start(code, MINIGPT_LAUNCHER_PID=str(os.getpid())).communicate()
    assert output.startswith("None ")  # so that its own children don't follow
    assert "follow-parent" in output


def test_no_torch_is_imported():
    loaded = "import sys; print('torch' in sys.modules, 'typer' in sys.modules)"
    assert start(f"{FOLLOW}{loaded}").communicate()[0] == "False False\n"
    code = f"{FOLLOW}import minigpt_cli.distributed.launch, minigpt_cli.cli, sys\n"
    assert start(f"{code}print('torch' in sys.modules)").communicate()[0] == "False\n"
