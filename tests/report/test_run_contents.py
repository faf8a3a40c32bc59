"""What is read of a run: whole, old, copied elsewhere, in pieces, or no run at all."""

import itertools
import json
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from minigpt_cli.core.errors import UserError
from minigpt_cli.report.incident_list import MAX_INCIDENTS, list_incidents
from minigpt_cli.report.run_contents import read_run, runs_by_name
from minigpt_cli.report.sample_list import MAX_COMPLETIONS, list_samples
from tests.helpers.processes import ROOT
from tests.helpers.report_runs import write_lines, write_run

OLD = ROOT / "tests/data/old"


def test_names_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a", "runs/b", "other/a"):
        write_run(Path(name))
    assert runs_by_name([Path("runs/a"), Path("runs/b")]) == {
        "a": Path("runs/a"), "b": Path("runs/b"),
    }  # fmt: skip
    # Named twice, or by what is in it, a run is one run.
    Path("runs/a/checkpoints/step-00000004").mkdir(parents=True)
    again = [Path("runs/a"), tmp_path / "runs/a", Path("runs/a/checkpoints/step-00000004")]
    assert runs_by_name(again) == {"a": Path("runs/a")}
    found = runs_by_name([Path("runs/a"), Path("other/a"), Path("runs/b")])
    assert [*found] == ["runs/a", "other/a", "runs/b"]
    monkeypatch.chdir("runs/a")
    assert [*runs_by_name([Path(".")])] == ["a"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "nowhere: no such run"),
        ("file", "file: is a file; name a run directory"),
        ("empty", "empty: is no run: it holds no recipe.toml; name a run directory"),
        ("runs", "runs: is no run, but 1 is in it: name it: runs/a"),
    ],
)
def test_what_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, said: str):
    monkeypatch.chdir(tmp_path)
    write_run(Path("runs/a"))
    Path("file").touch()
    Path("empty").mkdir()
    with pytest.raises(UserError) as error:
        runs_by_name([Path(name)])
    assert str(error.value) == said


def test_a_run_of_93d8a84(tmp_path: Path):
    """It has no seconds, no samples, no incidents, and another first line in its recipe."""
    shutil.copytree(OLD / "runs/base", tmp_path / "runs/base")
    shutil.copytree(OLD / "data", tmp_path / "data")
    run = read_run(tmp_path / "runs/base", "base")
    assert run.problems == []
    assert run.state == "finished"
    assert run.metrics.training["step"].tolist() == [*range(1, 11)]
    assert run.metrics.validation["step"].tolist() == [10]
    assert run.recipe is not None
    assert run.recipe.origin["optimizer.lr"] == "recipe"
    (saved,) = run.checkpoints
    assert saved.manifest is not None
    assert saved.manifest.val_loss == run.metrics.validation["val_loss"][0]
    # The dataset lies beside runs/, where minigpt was started.
    assert run.dataset is not None
    assert run.dataset.fingerprint == run.fingerprints["content"]


def test_a_copy_without_the_rest(tmp_path: Path):
    shutil.copytree(OLD / "runs/base", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy/checkpoints")
    for name in ("environment.json", "status.json", "recipe.toml"):
        (tmp_path / "copy" / name).unlink()
    run = read_run(tmp_path / "copy", "copy")
    assert run.problems == [f"{tmp_path}/copy/recipe.toml: is missing"]
    assert (run.state, run.dataset, run.checkpoints, run.environment) == ("unknown", None, [], {})
    assert len(run.metrics.training["step"]) == 10


def test_damaged_parts_are_named(tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(OLD / "runs/base", run)
    checkpoint = run / "checkpoints/step-00000010"
    (checkpoint / "manifest.json").write_text("{")
    (run / "environment.json").write_text("[1]")
    (run / "recipe.toml").write_text("[train]\nstepz = 1\n")
    (run / "status.json").write_text('{"status": ["running"], "message": 3}')
    (run / "incidents").mkdir()
    (run / "incidents/step-00000003-spike.json").write_text("{")
    (run / "samples.jsonl").mkdir()
    found = read_run(run, "run")
    said = " ".join(found.problems)
    for name in ("environment.json", "recipe.toml", "spike.json", "samples.jsonl"):
        assert name in said
    assert "\n" not in said
    assert len(found.problems) == 4
    assert found.checkpoints[0].manifest is None
    assert "manifest.json" in found.checkpoints[0].problem
    assert found.state == "unknown"


def test_a_killed_run(tmp_path: Path):
    run = write_run(tmp_path / "run")
    child = subprocess.Popen(["sleep", "1000"])
    status = {"status": "running", "pid": child.pid, "host": socket.gethostname()}
    try:
        (run / "status.json").write_text(json.dumps(status))
        assert read_run(run, "run").state == "running"
    finally:
        child.kill()
        child.wait()
    assert read_run(run, "run").state == "killed"
    (run / "status.json").write_text(json.dumps(status | {"host": "another machine"}))
    assert read_run(run, "run").state == "running"  # as far as it is known here


def test_incidents(tmp_path: Path):
    run = write_run(tmp_path / "run")
    nonfinite = {
        "kind": "nonfinite", "step": 7, "loss": "nan", "grad_norm": "inf", "loss_limit": None,
        "windows": [{"window": 1, "examples": [{"example": 5, "text": "hello"}]}],
    }  # fmt: skip
    (run / "incidents/step-00000007-offset-59-nonfinite.json").write_text(json.dumps(nonfinite))
    (run / "incidents/notes.txt").write_text("mine")
    found, problems = list_incidents(run)
    assert problems == []
    assert [(each.kind, each.steps, each.reason) for each in found] == [
        ("nonfinite", (7,), "loss nan, gradient norm inf"),
        ("spike", (41, 43), "loss 9.5 is above 4.25, 2 steps were skipped"),
        ("rollback", (40, 44), "rolled back to step 40; the data in between is skipped"),
    ]
    assert found[0].batch == ("example 5: hello",)
    assert found[1].batch == ("train-00000.npy, offset 96: a b c",)
    for step in range(100, 100 + MAX_INCIDENTS):
        (run / f"incidents/step-{step:08d}-spike.json").write_text("{}")
    found, problems = list_incidents(run)
    assert len(found) == MAX_INCIDENTS
    assert problems == [f"{run}/incidents: 3 more incidents are not shown"]


def test_samples_of_a_long_run(tmp_path: Path):
    rows = [{"step": step, "prompt": f"p{step % 2}", "completion": "x" * step}
            for step in range(1, 5001)]  # fmt: skip
    write_lines(tmp_path / "samples.jsonl", rows)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 1, "prompt": 3, "completion": "x"}\n{"step": 5001, "prom')
    even, odd = sorted(list_samples(tmp_path), key=lambda each: each.prompt)
    for each, first in ((even, 2), (odd, 1)):
        steps = [step for step, _ in each.completions]
        assert each.count == 2500
        assert MAX_COMPLETIONS <= len(steps) <= 2 * MAX_COMPLETIONS
        assert steps == sorted(steps)
        assert (steps[0], steps[-1]) == (first, 4998 + first)
        gaps = [after - before for before, after in itertools.pairwise(steps)]
        assert max(gaps[:-1]) == min(gaps[:-1]) >= gaps[-1]  # evenly, but for the last
    assert even.completions[-1][1] == "x" * 2000 + "..."
