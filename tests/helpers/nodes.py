"""Two nodes of a cluster on this machine: network namespaces, joined by a cable that can be cut.

They share this machine's disks, as the nodes of a cluster do, and nothing else.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.helpers.processes import environment

ADDRESSES = ("10.87.0.1", "10.87.0.2")
NOBODY = "10.87.0.9"  # packets to it are sent, and lost


class Nodes:
    """The names of both namespaces and of the cable's ends, one in each."""

    def __init__(self, pair: str = "a") -> None:
        """One pair may be killed and cut while another one's processes go on."""
        self.names = tuple(f"minigpt-{os.getpid()}{pair}-{node}" for node in (0, 1))
        self.ends = tuple(f"mg{os.getpid()}{pair}-{node}" for node in (0, 1))
        self.ports = iter(range(29_400, 60_000))
        self.started: list[int] = []  # process ids

    def up(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", self.ends[0], "netns", self.names[0], "type", "veth",
            "peer", "name", self.ends[1], "netns", self.names[1])  # fmt: skip
        for name, end, address in zip(self.names, self.ends, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            _ip("-n", name, "link", "set", end, "up")
        _ip("-n", self.names[1], "neighbour", "add", NOBODY, "lladdr", "02:00:00:00:00:09",
            "dev", self.ends[1])  # fmt: skip

    def down(self) -> None:
        """Kill what still runs on the nodes, and remove them."""
        for node, name in enumerate(self.names):
            with suppress(OSError, subprocess.SubprocessError):
                self.kill(node)
                _ip("netns", "delete", name)  # and its end of the cable

    @contextmanager
    def cut(self) -> Iterator[None]:
        _ip("-n", self.names[0], "link", "set", self.ends[0], "down")
        try:
            yield
        finally:
            _ip("-n", self.names[0], "link", "set", self.ends[0], "up")

    def processes(self, node: int) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.names[node]).split()]

    def kill(self, node: int) -> None:
        for pid in self.processes(node):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def start(
        self, node: int | None, log: Path, *command: object, **env: str
    ) -> subprocess.Popen[bytes]:
        """Start Python with these arguments on a node, or on the machine itself; what it and its
        children say goes to log."""
        there = [] if node is None else ["ip", "netns", "exec", self.names[node]]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*there, sys.executable, *map(str, command)], cwd=log.parent,
                env=environment() | env,
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.started.append(process.pid)
        return process


class Job:
    """One command that torchrun starts on both nodes, as docs/cluster.md tells."""

    def __init__(
        self, nodes: Nodes, folder: Path, *arguments: object, torchrun: tuple[str, ...] = ()
    ):
        """Start it; ``torchrun`` holds further options of torchrun."""
        self.nodes = nodes
        port = next(nodes.ports)
        endpoint = f"{ADDRESSES[0]}:{port}"
        self.logs = [folder / f"{port}-{node}.log" for node in (0, 1)]
        self.launchers = []
        for node, (log, address) in enumerate(zip(self.logs, ADDRESSES, strict=True)):
            start = [
                "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, "--local-addr", address,
                "--rdzv-conf", f"is_host={1 - node}", "--shutdown-timeout", "600",
                "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGUSR1", *torchrun,
                "-m", "minigpt_cli", *arguments,
            ]  # fmt: skip
            self.launchers.append(nodes.start(node, log, *start))

    def workers(self, node: int) -> list[int]:
        """What runs there that was not started by ``start``."""
        return [pid for pid in self.nodes.processes(node) if pid not in self.nodes.started]

    def end(self, seconds: float = 240) -> list[int]:
        """Wait for both launchers, after which nothing may be left; their exit codes."""
        codes = [launcher.wait(timeout=seconds) for launcher in self.launchers]
        assert [self.workers(node) for node in (0, 1)] == [[], []]
        return codes

    def said(self, node: int) -> list[str]:
        """The lines that minigpt itself has printed about errors."""
        lines = self.log(node).splitlines()
        return [line for line in lines if line.startswith("minigpt: ")]

    def log(self, node: int) -> str:
        return self.logs[node].read_text()


def _ip(*arguments: str) -> str:
    return subprocess.run(
        ["ip", *arguments], check=True, capture_output=True, text=True, timeout=20
    ).stdout
