import json
import math
import time
from pathlib import Path

from minigpt_cli.report import metrics
from minigpt_cli.report.live import step_line
from minigpt_cli.report.live_layout import duration


def test_metrics_are_cut_back_to_one_curve(tmp_path: Path):
    file = metrics.MetricsFile(tmp_path)
    for step in (1, 2, 3):
        file.write({"step": step, "loss": 1 / step})
    file.write({"step": 3, "val_loss": math.nan})
    file.flush()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert abs(last.pop("time") - time.time()) < 60
    assert last == {"step": 3, "val_loss": None}
    file.close()

    with (tmp_path / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": null}\n[1]\n{"step": 2, "lo')
    metrics.cut_back(tmp_path, 2)
    pairs = [(line["step"], line["loss"]) for line in metrics.read(tmp_path)]
    assert pairs == [(1, 1.0), (2, 0.5)]
    again = metrics.MetricsFile(tmp_path)
    again.write({"step": 3})
    again.close()
    assert [line["step"] for line in metrics.read(tmp_path)] == [1, 2, 3]


def test_metrics_go_on_in_the_file_that_was_cut_back(tmp_path: Path):
    file = metrics.MetricsFile(tmp_path)
    for step in (1, 2, 3):
        file.write({"step": step, "loss": 0.5})
    file.write({"step": 2, "val_loss": 0.5})
    file.cut_back(2, evaluated=False)
    file.write({"step": 3, "loss": 0.25})
    file.close()
    lines = [(line["step"], line["loss"]) for line in metrics.read(tmp_path)]
    assert lines == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_a_steps_line():
    values = {
        "step": 10, "loss": 3.14159, "lr": 1e-3, "grad_norm": 0.5,
        "tokens_per_second": 12345.6, "mfu": None,
    }  # fmt: skip
    line = step_line(values, 100, 3700)
    assert line == (
        "step 10/100  loss 3.1416  lr 1.00e-03  grad norm 0.500  12,346 tok/s  "
        "MFU n/a  left 1:01:40"
    )
    assert "MFU 41.2%" in step_line(values | {"mfu": 0.412}, 100, 1)
    assert duration(math.inf) == "?"
    assert duration(59.6) == "1:00"
