"""A worker fails or dies: the parent reports it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from minigpt_cli.core.errors import UserError
from minigpt_cli.prepare.encode import LAST, TextBatch, encoders
from tests.helpers.processes import ROOT
from tests.helpers.waiting import wait_until

PIECE = b"the quick brown fox " * 200_000
ENCODE = f"""
import sys
from pathlib import Path
from minigpt_cli.core.errors import UserError
from minigpt_cli.prepare.encode import LAST, TextBatch, encoders
with encoders(1, Path(sys.argv[1]), 0, "uint32") as submit:
    try:
        submit(TextBatch(({PIECE[:20]!r} * 200_000,), bytes([LAST]))).result()
    except UserError as error:
        sys.exit(str(error))
"""


def written(pid: int) -> int:
    """Return how many bytes a process has written so far."""
    found = re.search(r"wchar: (\d+)", Path(f"/proc/{pid}/io").read_text())
    assert found
    return int(found[1])


def sleeps(pid: int) -> bool:
    """Return whether a process uses no processor for a while."""
    stat = Path(f"/proc/{pid}/stat")
    before = stat.read_text()
    time.sleep(0.3)
    return stat.read_text() == before and ") S " in before


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@pytest.mark.parametrize(
    ("signum", "message"),
    [
        (signal.SIGKILL, "a tokenizer process died (SIGKILL); if memory ran out, run the same"),
        # Where its own limit is reached; fewer workers don't help.
        (signal.SIGABRT, "the tokenizer takes more than 2 GB of memory for a text: use another"),
    ],
)
def test_worker_killed_while_it_answers(dataset: Path, signum: int, message: str):
    """Nobody reads meanwhile, so the answer stays half written."""
    parent = subprocess.Popen(
        [sys.executable, "-c", ENCODE, dataset / "tokenizer.json"], stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: children(parent.pid) or parent.poll() is not None)
        (worker,) = children(parent.pid)
        wait_until(lambda: written(parent.pid) > len(PIECE))
        parent.send_signal(signal.SIGSTOP)
        wait_until(lambda: sleeps(worker))
        os.kill(worker, signum)
        parent.send_signal(signal.SIGCONT)
        _, errors = parent.communicate(timeout=240)
    finally:
        parent.kill()
    assert parent.returncode == 1
    assert errors.startswith(message)


@pytest.mark.parametrize("size", [10, 5_000_000])
def test_worker_that_fails_before_it_reads(tmp_path: Path, size: int):
    with encoders(1, tmp_path / "missing.json", 0, "uint32") as submit:
        future = submit(TextBatch((b"x" * size,), bytes([LAST])))
        with pytest.raises(UserError, match=r"can't be loaded: no tokenizer at .*missing\.json"):
            future.result(timeout=240)
