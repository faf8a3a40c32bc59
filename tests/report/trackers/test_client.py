"""Trackers that fail, hang or are missing: training goes on, within bounds."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from minigpt_cli.core.errors import Stopped, UserError
from minigpt_cli.core.status import read_tracking, write_status, write_tracking
from minigpt_cli.recipe import Recipe
from minigpt_cli.report.metrics import MetricsFile
from minigpt_cli.report.trackers import client
from minigpt_cli.report.trackers.client import Trackers
from tests.helpers.tracked import tensorboard_curves, trackio_curves, wandb_runs
from tests.helpers.wandb_service import wandb_service

pytest.importorskip("tensorboard")
pytest.importorskip("trackio")
pytest.importorskip("wandb")
MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def trackers() -> Iterator[Trackers]:
    made = Trackers()
    yield made
    made.close(None, None, None)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without a login."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "NETRC")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def children() -> set[int]:
    """This process's trackers that run."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(") ")[2].split()[1])
            if parent == os.getpid() and b"trackers.process" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
        except OSError:
            continue
    return found


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, trackers: Trackers):
    monkeypatch.setattr(sys, "path", [])
    for name in list(sys.modules):
        if name.split(".")[0] == "wandb":
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match="wandb is not installed: pip install wandb"):
        trackers.start(["wandb"])


@pytest.mark.usefixtures("nobody")
def test_wandb_does_not_ask_for_a_login(trackers: Trackers, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match=r"no API key: run wandb login, or set WANDB_MODE=offline"):
        trackers.start(["wandb"])
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(UserError, match=r"invalid: .*run wandb login"):
        trackers.start(["wandb"])


@pytest.mark.usefixtures("nobody")
def test_a_service_that_does_not_answer_leaves_an_offline_run(
    tmp_path: Path,
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    for name, value in {
        "WANDB_API_KEY": 40 * "a", "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_INIT_TIMEOUT": "1", "WANDB_PROJECT": "mine",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with ExitStack() as resources:
        trackers = Trackers()
        resources.push(trackers.close)
        trackers.start(["wandb"])
        trackers.begin(make_recipe(), tmp_path, 0, False, went_back=False)
        trackers.log({"step": 1, "loss": 2.0, "time": 1000.0})
    ((about, curves),) = wandb_runs(tmp_path)
    assert about.run.run_id == f"{read_tracking(tmp_path)['id']}-offline"
    assert about.run.project == "mine"
    assert curves["loss"] == [(1, 2.0)]
    assert curves["_timestamp"] == [(1, 1000)]
    assert "wandb: no answer (Failed" in capfd.readouterr().err


@pytest.mark.usefixtures("nobody")
def test_wandb_online(
    tmp_path: Path,
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    """A run that was stopped continues under its id; one that goes back has a new part. A key that
    asks for nothing, and a service that knows only what it is sent."""
    monkeypatch.setenv("WANDB_API_KEY", 40 * "a")
    metrics = MetricsFile(tmp_path)
    with wandb_service() as (address, runs):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        for steps, error in (((1, 2), Stopped("", signal.SIGTERM)), ((3, 4, 5), None)):
            trackers = Trackers()
            trackers.start(["wandb"])
            trackers.begin(make_recipe(), tmp_path, steps[0] - 1, True, went_back=False)
            for step in steps:
                trackers.log(metrics.write({"step": step, "loss": 1 / step}))
            if error is None:
                metrics.cut_back(4, evaluated=True)
                trackers.go_back(4, is_evaluated=True)
                trackers.log(metrics.write({"step": 5, "loss": 0.5}))
            monkeypatch.setattr(client, "_STOP_SECONDS", 60)  # on a busy machine
            trackers.close(type(error) if error else None, error, None)
    id = read_tracking(tmp_path)["id"]
    assert {name: run.group for name, run in runs.items()} == dict.fromkeys(
        [id, f"{id}-2"], f"{tmp_path.name}-{id}"
    )
    before = [(step, pytest.approx(1 / step)) for step in range(1, 6)]
    assert runs[id].curve("loss") == before
    assert runs[f"{id}-2"].curve("loss") == [*before[:4], (5, 0.5)]
    assert runs[f"{id}-2"].exit_code == 0
    assert f"wandb: {address}/me/project/runs/{id}-2" in capfd.readouterr().err


def test_one_curve_where_the_step_is_evaluated_again(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    """Rows of trackers that a run gets later are read from metrics.jsonl; a copy of the run
    directory is another run."""
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    recipe, run, copy = make_recipe(), tmp_path / "a run", tmp_path / "copy"
    run.mkdir()
    metrics = MetricsFile(run)
    both = [{"step": 2, "loss": 0.5}, {"step": 2, "val_loss": 0.625, "mfu": None}]
    with ExitStack() as resources:
        trackers = Trackers()
        resources.push(trackers.close)
        trackers.start(["tensorboard"])
        trackers.begin(recipe, run, 0, False, went_back=False)
        for row in ({"step": 1, "loss": 1.0}, *both, {"step": 3, "loss": 0.375}):
            trackers.log(metrics.write(row))
        metrics.cut_back(2, evaluated=False)
        trackers.go_back(2, is_evaluated=False)
        for row in (both[1], {"step": 3, "loss": 0.25}):
            trackers.log(metrics.write(row))
    expected = {"loss": [(1, 1.0), (2, 0.5), (3, 0.25)], "val_loss": [(2, 0.625)]}
    board = tensorboard_curves(run)
    assert {name: board[name] for name in expected} == expected
    assert len(list((run / "tensorboard").iterdir())) == 2

    write_status(run, "finished", 0, 3, "")
    first = read_tracking(run)
    shutil.copytree(run, copy)
    (copy / "trackio").mkdir()
    (copy / "trackio/minigpt.db").touch()  # of a process that was killed
    for place, part in ((run, 2), (copy, 1)):
        with ExitStack() as resources:
            trackers = Trackers()
            resources.push(trackers.close)
            trackers.start(["trackio"])
            trackers.begin(recipe, place, 3, True, went_back=False)
        (name,) = (found := trackio_curves(place / "trackio/minigpt.db"))
        assert found[name] == expected
        tracking = read_tracking(place)
        assert tracking["part"] == part
        assert name == f"{place.name}-{tracking['id']}"
        assert (tracking["id"] == first["id"]) == (place == run)


def test_a_killed_tracker_is_a_warning(
    tmp_path: Path, make_recipe: MakeRecipe, trackers: Trackers, capfd: pytest.CaptureFixture[str]
):
    trackers.start(["tensorboard"])
    trackers.begin(make_recipe(), tmp_path, 0, False, went_back=False)
    (child,) = children()
    os.kill(child, signal.SIGKILL)
    while children():
        trackers.log({"step": 1, "loss": 1.0})
    for step in range(2, 5):
        trackers.log({"step": step, "loss": 1.0})
    told = capfd.readouterr().err
    assert told.count("warning: tensorboard ended unexpectedly") == 1
    assert "training goes on without it" in told


def test_a_tracker_that_hangs_delays_nothing(
    tmp_path: Path,
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
):
    """It stands still: rows fill the pipe and wait here, up to a limit; or the run is stopped."""
    monkeypatch.setattr(client, "_MOST_PENDING", 1 << 18)
    monkeypatch.setattr(client, "_STOP_SECONDS", 0.2)
    full = Trackers()
    full.start(["tensorboard"])
    (child,) = children()
    os.kill(child, signal.SIGSTOP)
    full.begin(make_recipe(), tmp_path, 0, False, went_back=False)
    for step in range(10_000):
        full.log({"step": step, "loss": 1.0})
        if "tensorboard takes no more rows" in capfd.readouterr().err:
            break
    else:
        raise AssertionError("no warning")

    slow = Trackers()
    slow.start(["tensorboard"])
    (child,) = children() - {child}
    os.kill(child, signal.SIGSTOP)
    slow.begin(make_recipe(), tmp_path, 0, False, went_back=False)
    slow.close(Stopped, Stopped("", signal.SIGTERM), None)
    assert "has not finished; it goes on for at most" in capfd.readouterr().err
    os.kill(child, signal.SIGCONT)
    deadline = time.monotonic() + 60
    while children() and time.monotonic() < deadline:
        os.waitpid(-1, os.WNOHANG)
        time.sleep(0.01)
    assert not children()


def test_the_status_keeps_the_id(tmp_path: Path):
    tracking = {"id": "ab12", "part": 3, "directory": str(tmp_path)}
    write_tracking(tmp_path, tracking)
    write_status(tmp_path, "running", None, 5, "")
    write_status(tmp_path, "failed", 1, 6, "lost")
    content = json.loads((tmp_path / "status.json").read_text())
    assert (content["status"], content["step"]) == ("failed", 6)
    assert content["tracking"] == read_tracking(tmp_path) == tracking


@pytest.mark.parametrize("tracking", [[], {"id": "../x", "part": 1, "directory": "."}, {"id": 1}])
def test_a_false_id_is_replaced(tmp_path: Path, tracking: object, make_recipe: MakeRecipe):
    (tmp_path / "status.json").write_text(json.dumps({"tracking": tracking}))
    trackers = Trackers()
    trackers.start(["tensorboard"])
    trackers.begin(make_recipe(), tmp_path, 0, False, went_back=True)
    trackers.close(None, None, None)
    assert read_tracking(tmp_path)["id"].isalnum()
    assert read_tracking(tmp_path)["part"] == 1
