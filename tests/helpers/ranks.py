"""Several real ranks on this machine, started by their environment, as torchrun starts them."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.processes import ROOT, environment

TRAIN_MANY = ROOT / "tests/distributed/train_many.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def gone(process: int) -> bool:
    """Return whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """Return the environment of one rank; rank 0 hosts the store."""
    return environment() | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def train_many(ranks: int, jobs: list[dict[str, Any]], folder: Path, code: int = 0) -> list[str]:
    """Train the runs of ``jobs`` on ``ranks`` ranks; see train_many.py.

    Args:
        code: what all ranks exit with.

    Returns:
        What each rank printed.
    """
    file = folder / f"jobs-{ranks}-{len(os.listdir(folder))}.json"
    file.write_text(json.dumps(jobs))
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, str(TRAIN_MANY), str(file)], cwd=ROOT,
            env=rank_environment(rank, ranks, port), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=280)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    codes = [process.returncode for process in started]
    assert codes == [code] * ranks, "\n".join(said)
    return said
