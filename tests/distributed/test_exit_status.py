"""How the ends of several processes become one exit code, against the rules in words."""

import itertools
import signal
from pathlib import Path

import pytest

from minigpt_cli.distributed.exit_status import (
    DONE,
    ExitStatus,
    exit_status,
    merge_exit_status,
    report_order,
)

KILLED = ExitStatus(1, "rank 1 was killed by SIGKILL")


@pytest.mark.parametrize(
    ("codes", "merged"),
    [
        ([0, 0], 0),
        ([0, 3], 3),
        ([75, 75], 75),
        ([130, 130], 130),
        ([0, 75], 75),
        ([75, 0], 75),
        ([3, 4], 3),  # the second because of the first
        ([4, 1], 4),
        ([1, 2], 1),
        ([2, 75], 2),
        ([75, 2], 2),  # so not everything is saved
        ([75, 0, 1], 1),
    ],
)
def test_first_failure_wins(codes: list[int], merged: int):
    status = DONE
    for code in codes:
        status = merge_exit_status(status, ExitStatus(code))
    assert status == ExitStatus(merged)


@pytest.mark.parametrize(
    ("returncode", "message"),
    [
        (-signal.SIGKILL, "rank 1 was killed by SIGKILL, probably out of memory"),
        (-signal.SIGSEGV, "rank 1 was killed by SIGSEGV"),
        (-signal.SIGTERM, "rank 1 was killed by SIGTERM"),
        (-40, "rank 1 was killed by signal 40"),
        (5, "rank 1 ended with exit code 5"),
        (127, "rank 1 ended with exit code 127"),
    ],
)
def test_unexplained_end(tmp_path: Path, returncode: int, message: str):
    run = tmp_path / "x"
    again = ExitStatus(1, f"{message}; run the same command again (docs/faq.md: it-hangs)")
    assert exit_status("rank 1", returncode, run) == again
    (run / "checkpoints/.writing-step-00000010").mkdir(parents=True)
    assert exit_status("rank 1", returncode, run) == again
    (run / "checkpoints/step-00000010").mkdir()
    resume = f"go on from the last checkpoint with `minigpt resume {run}` (docs/faq.md: it-hangs)"
    assert exit_status("rank 1", returncode, run) == ExitStatus(1, f"{message}; {resume}")


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 75, 130])
def test_explained_end(code: int):
    status = exit_status("rank 1", code, Path("runs/x"))
    assert status == ExitStatus(code)
    assert status.failed == (code in (1, 2, 3, 4))


def test_order_at_the_same_moment():
    """Whatever the order of ranks: an explained failure, then a crash, then a consequence."""
    for order in itertools.permutations([ExitStatus(1), KILLED, ExitStatus(75)]):
        assert min(order, key=report_order) == KILLED
    for order in itertools.permutations([ExitStatus(1), KILLED, ExitStatus(3)]):
        assert min(order, key=report_order) == ExitStatus(3)
    for order in itertools.permutations([ExitStatus(75), ExitStatus(1)]):
        assert min(order, key=report_order) == ExitStatus(1)
