"""Runs that are finished, running, killed, elsewhere or damaged, listed from their files."""

import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import locked
from minigpt_cli.report.metrics import read_last
from minigpt_cli.report.run_table import runs_json, runs_text
from minigpt_cli.report.runs import RunSummary, find_runs, summarize
from tests.helpers.processes import ROOT
from tests.helpers.recipes import TINY

NOW = "2026-11-20T12:00:00+0000"


def make_run(run: Path, status: str = "finished", **more: Any) -> Path:
    """A run of 12 steps, at step 8."""
    (run / "checkpoints/step-00000008").mkdir(parents=True)
    (run / "recipe.toml").write_text(TINY.format(data="data"))
    content = {
        "status": status, "exit_code": None, "step": None, "message": "", "time": NOW, "pid": 1,
        "host": socket.gethostname(),
    }  # fmt: skip
    (run / "status.json").write_text(json.dumps(content | more))
    state = {"val_loss": 3.5, "best_val_loss": 3.25, "tokens": 2048}
    (run / "checkpoints/step-00000008/state.json").write_text(json.dumps(state))
    lines = [
        {"step": 8, "tokens": 2048, "val_loss": 3.5, "time": 8.0},
        {"step": 9, "tokens": 2304, "loss": 3.75, "seconds": 61.5, "time": 9.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_a_summary(tmp_path: Path):
    assert summarize(make_run(tmp_path / "run", step=12)) == RunSummary(
        path=tmp_path / "run", status="finished", host=socket.gethostname(), step=12,
        total_steps=12, checkpoint_step=8, loss=3.75, val_loss=3.5, best_val_loss=3.25,
        tokens=2304, seconds=61.5, time=1795176000.0,
    )  # fmt: skip
    stopped = make_run(tmp_path / "stopped", "stopped", step=9, message="stopped by SIGTERM")
    found = summarize(stopped)
    assert (found.status, found.step, found.message) == ("stopped", 9, "stopped by SIGTERM")


def test_running_killed_and_elsewhere(tmp_path: Path):
    run = make_run(tmp_path / "run", "running")
    with locked(run / ".lock", "busy"):
        assert summarize(run).status == "running"
    killed = summarize(run)
    assert (killed.status, killed.step) == ("killed", 9)
    assert f"minigpt resume {run}" in killed.message
    with locked(run / ".lock", "a look at the lock doesn't keep it"):
        pass
    elsewhere = make_run(tmp_path / "elsewhere", "running", host="node7")
    found = summarize(elsewhere)
    assert (found.status, found.host) == ("unknown", "node7")
    assert "it runs on node7" in found.message
    with locked(elsewhere / ".lock", "busy"):
        assert summarize(elsewhere).status == "running"
    os.mkfifo(run / "pipe")
    (run / ".lock").unlink()
    (run / "pipe").rename(run / ".lock")
    assert summarize(run).status == "unknown"


def test_runs_without_some_files(tmp_path: Path):
    """One that prepares its data, a copy without status, one of commit 93d8a84."""
    early = tmp_path / "early"
    early.mkdir()
    shutil.copy(make_run(tmp_path / "run", "running") / "status.json", early)
    with locked(early / ".lock", "busy"):
        found = summarize(early)
    assert (found.status, found.step, found.total_steps) == ("running", None, None)
    assert "before the first checkpoint" in summarize(early).message
    copied = make_run(tmp_path / "copied")
    (copied / "status.json").unlink()
    (copied / "metrics.jsonl").unlink()
    found = summarize(copied)
    assert (found.status, found.step, found.tokens, found.val_loss) == ("unknown", 8, 2048, 3.5)
    old = summarize(ROOT / "tests/data/old/runs/base")
    assert (old.status, old.step, old.total_steps, old.host) == ("finished", 10, 10, None)
    assert (old.seconds, old.tokens) == (None, 2560)


def test_the_runs_of_a_tree(tmp_path: Path):
    """Each once, at any depth; nothing inside a run, nothing hidden, nothing of other programs."""
    for place, when in (("a", "02"), ("deep/er/b", "04"), ("deep/c", "03")):
        run = make_run(tmp_path / place, time=f"2026-11-{when}T00:00:00+0000")
        make_run(run / "final")
    make_run(tmp_path / ".trash/d")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/status.json").write_text('{"status": "ok"}')
    (tmp_path / "other/metrics.jsonl").write_text("{}\n")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd/status.json").write_text("no JSON")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/recipe.toml").write_text(TINY)
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    (tmp_path / "deep/loop").symlink_to(tmp_path)
    found = [str(run.path.relative_to(tmp_path)) for run in find_runs(tmp_path)]
    assert [name.replace("link", "deep") for name in found] == ["deep/er/b", "deep/c", "a"]
    assert [run.path for run in find_runs(tmp_path / "a")] == [tmp_path / "a"]
    assert find_runs(tmp_path / "a/checkpoints") == []
    assert find_runs(tmp_path / "other") == []
    for missing in ("nowhere", "other/status.json"):
        with pytest.raises(UserError, match="directory"):
            find_runs(tmp_path / missing)


@pytest.mark.parametrize("name", ["status.json", "recipe.toml", "metrics.jsonl", "state.json"])
@pytest.mark.parametrize("content", ["", "{", '{"status": [1]}', "\x00\xff" * 50, None, 0])
def test_damage(tmp_path: Path, name: str, content: str | int | None):
    """None: a directory in the file's place; 0: a pipe."""
    run = make_run(tmp_path / "run")
    file = next(run.rglob(name))
    file.unlink()
    if content is None:
        file.mkdir()
    elif content == 0:
        os.mkfifo(file)
    else:
        file.write_text(str(content))
    (found,) = find_runs(tmp_path)
    assert json.loads(json.dumps(runs_json([found])))
    harmless = (name, content) in {
        ("metrics.jsonl", ""), ("metrics.jsonl", "{"), ("metrics.jsonl", '{"status": [1]}'),
        ("metrics.jsonl", "\x00\xff" * 50), ("state.json", '{"status": [1]}'),
    }  # fmt: skip
    assert found.status == ("finished" if harmless else "damaged"), found.message
    if not harmless:
        assert name in found.message
        assert "\n" not in found.message
        assert name in runs_text([found], tmp_path, 80).splitlines()[1:][-1]


@pytest.mark.parametrize(
    "values",
    [
        {"tokens": 10**400, "loss": "x", "seconds": -(10**400), "time": 1e300},
        {"tokens": 1.5, "loss": None, "seconds": None, "time": [1]},
        {"tokens": True, "loss": True, "seconds": 9.2e18, "time": -9.2e18},
    ],
)
def test_odd_numbers(tmp_path: Path, values: dict[str, object]):
    run = make_run(tmp_path / "run", time=7, step="x", host=["a"], message={"a": 1})
    line = {"step": 9, "loss": 1} | values
    (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    state = {"val_loss": "x", "best_val_loss": {}, "tokens": []}
    (run / "checkpoints/step-00000008/state.json").write_text(json.dumps(state))
    found = find_runs(tmp_path)
    assert found[0].best_val_loss is None
    assert json.loads(json.dumps(runs_json(found)))
    assert len(runs_text(found, tmp_path, 200).splitlines()) == 2


def test_the_end_of_long_metrics(tmp_path: Path):
    """The last evaluation may be far from the end; the last line may be torn."""
    step = '{"step": %d, "loss": 2.5, "grad_norm": 0.123456789, "time": 1.0}\n'
    lines = [step % number for number in range(100_000)]
    lines[99_000] += '{"step": 99000, "val_loss": 3.0}\n'
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"step": 100000, "lo')
    last, evaluation = read_last(tmp_path)
    assert (last["step"], evaluation["step"]) == (99_999, 99_000)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]))
    assert read_last(tmp_path)[1] == {}


def test_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    long = "a-long-name-of-a-run-with-its-learning-rate-and-size-lr3e-4"
    now = time.time()
    runs = [
        RunSummary(Path("runs", long), "running", "", "n", 123_456, 600_000, 120_000, 2.34567, 2.5,
                   2.5, 50_566_144_000, 3 * 3600 + 61, now),
        RunSummary(Path("runs/\x1b[2Jx"), "failed", "the disk is full\x1b[2J", None, 9, 12),
        RunSummary(Path("runs/b"), "finished", "", None, 12, 12, 12, 1.5, 1.25, 1.25, 3072, 59.6,
                   86_400.0),
    ]  # fmt: skip
    wide, narrow = (runs_text(runs, Path("runs"), width) for width in (200, 80))
    assert runs_text(runs, Path("runs"), None) == wide
    assert wide.splitlines()[1].startswith(f"runs/{long}  running   123k/600k  2.346")
    today = time.strftime("%m-%d %H:%M", time.localtime(now))
    assert wide.splitlines()[1].endswith(f"2.500   50.6B  3:01:01  {today}")
    assert max(map(len, narrow.splitlines())) <= 80
    assert narrow.splitlines()[0].startswith("in runs ")
    assert narrow.splitlines()[1].startswith("a-long-…-lr3e-4 ")
    assert narrow.splitlines()[3].endswith("12/12  1.500  1.250    3072     1:00   1970-01-02")
    assert "\x1b" not in wide
    assert wide.splitlines()[-1] == "runs/\\x1b[2Jx: the disk is full\\x1b[2J"
