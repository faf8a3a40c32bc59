"""Event files on a disk that is full for a while; the rest is in tests/train/test_trackers.py."""

from pathlib import Path

import pytest

from minigpt_cli.report.trackers.tracker import TrackedRun
from tests.helpers.file_limit import limit_files
from tests.helpers.tracked import tensorboard_curves

pytest.importorskip("tensorboard")


def test_a_full_disk_tears_no_record(tmp_path: Path):
    from minigpt_cli.report.trackers.tensorboard import start_tensorboard

    run = TrackedRun(tmp_path, "run", "ab12", 1, 0, False, "[train]\nsteps = 1\n", {})
    tracker = start_tensorboard(run)
    (file,) = (tmp_path / "tensorboard").iterdir()
    tracker.log(1, 10.0, {"loss": 1.0})
    limit_files(file.stat().st_size + 20)
    with pytest.raises(OSError, match=r"File too large|full"):
        tracker.log(2, 11.0, {"loss": 0.5})
    limit_files(None)
    tracker.log(3, 12.0, {"loss": 0.25})
    tracker.finish(0)
    curves = tensorboard_curves(tmp_path)
    assert curves["loss"] == [(1, 1.0), (3, 0.25)]
    assert curves["recipe"] == [(0, "    [train]\n    steps = 1\n    ")]
