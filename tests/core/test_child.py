"""The child with limits: what it inherits, what its limits count, and what happens if it dies."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minigpt_cli.core import child
from minigpt_cli.core.child import ask, child_environment, ending
from minigpt_cli.core.errors import UserError
from tests.helpers.processes import ROOT

DIES = """
import os
from minigpt_cli.core.child import serve

def die(file, signum, times):
    with open(file, "a") as calls:
        calls.write("x")
    if os.path.getsize(file) <= times:
        os.kill(os.getpid(), signum)
    return "alive"

serve({"die": die}, {})
"""
# 2.5 GB are mapped before the limit is set, as by a library with a stack for each of many threads.
MAPS = """
import mmap
from minigpt_cli.core.child import MEMORY, limit_resources
mapped = mmap.mmap(-1, 5 << 29, flags=mmap.MAP_PRIVATE | 0x4000, prot=mmap.PROT_READ)  # NORESERVE
limit_resources(0, 0)
bytearray(MEMORY // 2)
try:
    bytearray(2 * MEMORY)
except MemoryError:
    print("limited")
"""


def test_one_thread(monkeypatch: pytest.MonkeyPatch):
    """OpenBLAS maps 41 MB for each core; with many cores nothing was left of the limit."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    monkeypatch.delenv(names[0], raising=False)
    monkeypatch.setenv(names[1], "64")
    assert [child_environment().get(name) for name in names] == ["1", "1", "1"]


def test_memory_that_was_mapped_before_does_not_count():
    done = subprocess.run(
        [sys.executable, "-c", MAPS], capture_output=True, text=True,
        env=child_environment() | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("limited\n", "")


@pytest.mark.parametrize(
    ("signum", "times", "calls", "message"),
    [
        (signal.SIGKILL, 1, 2, None),
        (signal.SIGSEGV, 1, 2, None),
        (signal.SIGKILL, 9, 2, r"f\.json: .*was killed \(SIGKILL\).*if memory ran out"),
        (signal.SIGSEGV, 9, 2, r"f\.json: crashes \(SIGSEGV\); use another tokenizer or chat temp"),
        (signal.SIGABRT, 9, 1, r"f\.json: takes more than 2 GB of memory; use another tokenizer"),
        (signal.SIGXCPU, 9, 1, r"f\.json: takes more than 10 seconds of CPU time; use another"),
    ],
)
def test_child_that_dies_is_started_again_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    signum: int, times: int, calls: int, message: str | None,
):  # fmt: skip
    """Unless it ran into a limit: it would again."""
    (tmp_path / "dies.py").write_text(DIES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(child, "_children", {})
    file = tmp_path / "calls"
    request = {"do": "die", "file": str(file), "signum": signum, "times": times}
    if message is None:
        assert ask("dies", request, "f.json") == "alive"
        child._end(child._children[os.getpid()])
    else:
        with pytest.raises(UserError, match=message) as caught:
            ask("dies", request, "f.json")
        assert "\n" not in str(caught.value)
        assert child._children == {}
    assert file.read_text() == "x" * calls


def test_ending():
    assert ending(-signal.SIGKILL) == "was killed (SIGKILL)"
    assert ending(3) == "crashes (exit code 3)"
