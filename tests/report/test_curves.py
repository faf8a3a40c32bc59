"""Curves against brute force, and files as a power cut or a stranger leaves them."""

import json
import math
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from minigpt_cli.core.errors import Damaged
from minigpt_cli.report.curves import TRAINED, at_steps, read_metrics, thinned
from tests.helpers.report_runs import write_lines


def test_columns(tmp_path: Path):
    write_lines(tmp_path / "metrics.jsonl", [
        {"step": 1, "tokens": 10, "loss": 3.5, "lr": 1, "grad_norm": None, "seconds": 2.0},
        {"step": 3, "tokens": 30, "loss": None, "lr": 0.5, "mfu": None, "seconds": 4.0, "new": "x"},
        {"step": 2, "tokens": 20, "val_loss": 4.0, "val_bits_per_byte": 1.5},
    ])  # fmt: skip
    found = read_metrics(tmp_path)
    training = found.training
    assert training["step"].tolist() == [1, 3]
    assert training["lr"].tolist() == [1, 0.5]
    for key in ("grad_norm", "mfu", "memory_bytes"):
        assert np.isnan(training[key]).all()
    assert training["loss"][0] == 3.5
    assert np.isnan(training["loss"][1])
    assert found.validation["val_loss"].tolist() == [4]
    assert found.validation["seconds"].tolist() == [3]  # between the logged steps
    axes, curves = thinned(training)
    assert {*axes} == {"step", "tokens", "seconds"}
    assert {*curves} == {"loss", "lr"}


def test_no_file(tmp_path: Path):
    found = read_metrics(tmp_path)
    assert found.training.keys() >= {"step", "tokens", "seconds", *TRAINED}
    assert all(not column.size for column in found.training.values())
    assert thinned(found.training) == ({}, {})
    assert np.isnan(at_steps(found.training, "tokens", np.array([1.0]))).all()


def test_torn_and_foreign_lines(tmp_path: Path):
    good = [json.dumps({"step": step, "loss": 1.0}) for step in (5, 2, 9)]
    bad = [
        '{"step": 3, "lo', "", "   ", "[1]", "7", "null", '{"step": "4", "loss": 1}', '{"loss": 1}',
        '{"step": -1, "loss": 1}', '{"step": true, "loss": 1}', '{"step": 1e3, "loss": 1}',
        "[" * 100_000, '{"step": 6, "loss": 1, "x": "' + "x" * 100_000 + '"}', "\x00", "\udcff",
        '{"step": 99999999999999999999, "loss": 1}',
    ]  # fmt: skip
    odd = ['{"step": 10, "loss": "2", "lr": [1], "grad_norm": 1e999, "mfu": NaN, "tokens": 1%s}'
           % ("0" * 400)]  # fmt: skip
    lines = [*good[:1], *bad, *good[1:], *odd, '{"step": 11, "loss": 1']
    (tmp_path / "metrics.jsonl").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    training = read_metrics(tmp_path).training
    assert training["step"].tolist() == [2, 5, 9, 10]
    assert training["loss"][:3].tolist() == [1, 1, 1]
    last = {key: column[3] for key, column in training.items()}
    assert all(math.isnan(last[key]) for key in ("loss", "lr", "grad_norm", "mfu", "tokens"))


def test_a_line_without_an_end_takes_no_memory(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    with file.open("wb") as stream:
        stream.write(b'{"step": 1, "loss": 1.0}\n')
        stream.truncate(64 << 20)  # zero bytes
        stream.seek(64 << 20)
        stream.write(b'\n{"step": 2, "loss": 1.0}\n')
    tracemalloc.start()
    try:
        assert read_metrics(tmp_path).training["step"].tolist() == [1, 2]
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_what_is_no_file(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.mkdir()
    with pytest.raises(Damaged, match="is not a regular file"):
        read_metrics(tmp_path)
    file.rmdir()
    with file.open("wb") as stream:
        stream.truncate(1 << 36)
    with pytest.raises(Damaged, match="is larger than"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("gaps", [False, True])
def test_buckets_keep_minimum_and_maximum(gaps: bool):
    chance = random.Random(0)
    rows, step = [], 0
    for number in range(10_000):
        step += chance.choice([1, 1, 7]) if not gaps else chance.choice([1, 3000])
        loss = math.nan if chance.random() < 0.3 else chance.gauss(3, 1)
        rows.append((step, 4 * step, number / 2, loss))
    columns = dict(zip(("step", "tokens", "seconds", "loss"), np.array(rows).T, strict=True))
    axes, curves = thinned(columns, buckets=100)
    width = (rows[-1][0] - rows[0][0] + 1) / 100
    buckets: dict[int, list[tuple[float, ...]]] = {}
    for row in rows:
        buckets.setdefault(int((row[0] - rows[0][0]) / width), []).append(row)
    curve = curves["loss"]
    assert curve.low is not None
    assert curve.high is not None
    assert len(axes["step"]) == len(buckets) <= 100
    for number, members in enumerate(buckets.values()):
        known = [loss for *_, loss in members if not math.isnan(loss)]
        middle = members[len(members) // 2]
        assert [axes[key][number] for key in ("step", "tokens", "seconds")] == [*middle[:3]]
        if known:
            assert (curve.low[number], curve.high[number]) == (min(known), max(known))
            assert curve.mean[number] == pytest.approx(sum(known) / len(known))
        else:
            assert np.isnan([curve.low[number], curve.mean[number], curve.high[number]]).all()


def test_few_rows_stay_as_they_are():
    columns = {"step": np.arange(1.0, 201), "tokens": np.arange(200.0), "loss": np.arange(200.0)}
    columns["seconds"] = np.full(200, np.nan)
    columns["loss"][7] = np.nan
    axes, curves = thinned(columns, buckets=100)
    assert axes.keys() == {"step", "tokens"}
    np.testing.assert_array_equal(curves["loss"].mean, columns["loss"])
    assert curves["loss"].low is None


def test_an_axis_never_goes_back():
    """In an edited file steps may fall; a chart's axis must still ascend."""
    columns = {"step": np.arange(1.0, 4), "tokens": np.array([5.0, 3, 9])}
    columns |= {"seconds": np.array([1.0, np.nan, 0.5]), "loss": np.ones(3)}
    axes, _ = thinned(columns)
    assert axes["tokens"].tolist() == [5, 5, 9]
    assert axes["seconds"].tolist() == [1, 1, 1]
