"""Runs that are tracked: one curve after a kill, a stop and a rollback, and the same bits."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt_cli.core.errors import Stopped
from minigpt_cli.core.status import read_status
from minigpt_cli.recipe import Recipe, load_recipe
from minigpt_cli.train.loop import fit
from minigpt_cli.train.start import resume_run, start_run
from tests.helpers.events import in_micro_batches, stop
from tests.helpers.poison import SPIKES, incidents, poisoned
from tests.helpers.runs import assert_same_run
from tests.helpers.tracked import (
    Curves,
    logged,
    tensorboard_curves,
    trackio_curves,
    wandb_runs,
)

pytest.importorskip("tensorboard")
pytest.importorskip("trackio")
pytest.importorskip("wandb")
MakeRecipe = Callable[..., Recipe]
ALL = 'log.trackers=["tensorboard", "wandb", "trackio"]'


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")


def train_and_die(recipe_file: Path, settings: list[str], run_dir: Path) -> None:
    os.environ["WANDB_MODE"] = "offline"  # the fork server may be older than the test
    run, state = start_run(load_recipe(recipe_file, settings), run_dir)
    in_micro_batches(run, {2 * 6: lambda: os.kill(os.getpid(), signal.SIGKILL)})  # in step 7
    fit(run, state)


def assert_has(curves: Curves, run_dir: Path) -> None:
    """Compare with metrics.jsonl; TensorBoard keeps float32."""
    for name, values in logged(run_dir).items():
        assert [step for step, _ in curves[name]] == [step for step, _ in values], name
        assert [value for _, value in curves[name]] == pytest.approx(
            [value for _, value in values], rel=1e-6
        )


def test_one_curve_after_a_kill_and_a_stop(tmp_path: Path, recipe_file: Path):
    """A killed process, one that SIGTERM stops, and one that ends the run: the same weights,
    losses and state as of a run without trackers, and each tracker shows them once."""
    settings = ["checkpoint.asynchronous=false", 'eval.prompts=["def", "import"]']
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    fit(*start_run(load_recipe(recipe_file, settings), straight))

    settings = [*settings, ALL]
    forks = multiprocessing.get_context("forkserver")
    process = forks.Process(target=train_and_die, args=(recipe_file, settings, run_dir))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    first_id = read_status(run_dir)["tracking"]["id"]
    assert max(step for step, _ in logged(run_dir)["loss"]) == 6

    run, state = resume_run(run_dir, [], [])
    assert state.step == 4
    in_micro_batches(run, {2 * 5: stop})  # in step 10
    with pytest.raises(Stopped):
        fit(run, state)
    fit(*resume_run(run_dir, [], []))
    assert_same_run(straight, run_dir, 12)
    status = read_status(run_dir)
    assert status["status"] == "finished"
    assert status["tracking"] == {"id": first_id, "part": 3, "directory": str(run_dir)}

    board = tensorboard_curves(run_dir)
    assert_has(board, run_dir)
    assert [step for step, _ in board["sample_2"]] == [4, 8, 12]
    assert all(text.startswith("    import") for _, text in board["sample_2"])

    ((name, trackio),) = trackio_curves(run_dir / "trackio/minigpt.db").items()
    assert name == f"run-{first_id}"
    assert_has(trackio, run_dir)
    assert [step for step, _ in trackio["sample_1"]] == [4, 8, 12]

    parts = wandb_runs(run_dir)
    assert [about.run.run_id for about, _ in parts] == [first_id, f"{first_id}-2", f"{first_id}-3"]
    assert {about.run.run_group for about, _ in parts} == {f"run-{first_id}"}
    assert {about.run.project for about, _ in parts} == {"minigpt"}
    assert [curves["loss"][-1][0] for _, curves in parts] == [6, 10, 12]
    assert_has(parts[-1][1], run_dir)  # the last part has the whole curve
    assert [step for step, _ in parts[-1][1]["sample_1/path"]] == [4, 8, 12]


def test_one_curve_after_a_rollback(tmp_path: Path, make_recipe: MakeRecipe, regular: Path):
    data = poisoned(regular, tmp_path / "data", [24, 25, 26])
    run_dir = tmp_path / "run"
    fit(*start_run(make_recipe(*SPIKES, ALL, data=data), run_dir))
    (rollback,) = incidents(run_dir, "rollback")
    assert (rollback["step"], rollback["to_step"]) == (27, 20)
    assert len(logged(run_dir)["loss"]) == 40

    assert_has(tensorboard_curves(run_dir), run_dir)
    (curves,) = trackio_curves(run_dir / "trackio/minigpt.db").values()
    assert_has(curves, run_dir)
    (_, before), (_, after) = wandb_runs(run_dir)
    assert [step for step, _ in before["loss"]] == list(range(1, 28))
    assert_has(after, run_dir)
    assert read_status(run_dir)["tracking"]["part"] == 2
