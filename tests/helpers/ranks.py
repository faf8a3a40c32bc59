"""Several real ranks on this machine, started as torchrun would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.processes import ROOT, environment

TRAIN_MANY = Path(__file__).parents[1] / "distributed" / "train_many.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def place(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment of one rank; rank 0 keeps the store."""
    return environment() | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def train_many(ranks: int, jobs: list[dict[str, Any]], folder: Path, code: int = 0) -> list[str]:
    """Train the runs of ``jobs`` on so many ranks; see train_many.py.

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
            [sys.executable, str(TRAIN_MANY), str(file)], cwd=ROOT, env=place(rank, ranks, port),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
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
