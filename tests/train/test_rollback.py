"""Back to the last checkpoint, and past the data: against a plain loop, and across resumes."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.core.errors import Diverged, Stopped
from minigpt_cli.data.loader import Batch
from minigpt_cli.data.order import sample_ids
from minigpt_cli.recipe import Recipe
from minigpt_cli.report import metrics
from minigpt_cli.report.incident_list import list_incidents
from minigpt_cli.train.loop import fit
from minigpt_cli.train.run import Run
from minigpt_cli.train.schedule import lr_factor
from minigpt_cli.train.start import resume_run, start_run
from minigpt_cli.train.step import train_step
from tests.helpers.events import in_micro_batches, stop
from tests.helpers.poison import BATCH, LENGTH, SEED, SPIKES, incidents, poisoned, unused_token
from tests.helpers.runs import assert_same_run, rewind, tensors
from tests.helpers.steps import everything

MakeRecipe = Callable[..., Recipe]
UNTIED = ("model.family=gpt2", "model.num_key_value_heads=4", "model.tie_word_embeddings=false")


def ruin(run: Run, token: int) -> None:
    """Near float32's limit, so that LayerNorm's mean overflows wherever this token is read."""
    with torch.no_grad():
        run.context.model.embed_tokens.weight[token] = 3e38


def by_hand(recipe: Recipe, data: Path, start: tuple[Run, RunState], position: int) -> Run:
    """The rest of a run as a plain loop that reads its batches itself: from the state that it
    stands at, on the batches from ``position`` on."""
    run, state = start
    tokens = np.load(data / "train-00000.npy").astype(np.int64)
    windows = (len(tokens) - 1) // LENGTH
    for step in range(state.step, 40):
        ids = sample_ids(SEED, position + step - state.step, BATCH, windows)
        rows = torch.from_numpy(tokens[ids[:, None] * LENGTH + np.arange(LENGTH + 1)])
        factor = lr_factor(recipe.schedule, 40, step + 1)
        train_step(run.context, Batch(rows[:, :-1], rows[:, 1:], None), step, factor)
    run.resources.close()
    return run


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("log_every", [1, 1000])
def test_spikes_in_a_row_roll_back(
    tmp_path: Path, make_recipe: MakeRecipe, regular: Path, name: str, log_every: int
):
    """Whenever the host looks, it ends with the weights of a run started from the checkpoint
    beyond the bad data."""
    data = poisoned(regular, tmp_path / "data", [24, 25, 26, 27, 28])  # from step 25 on
    recipe = make_recipe(*SPIKES, f"optimizer.name={name}", f"log.every_steps={log_every}",
                         data=data)  # fmt: skip
    run_dir = tmp_path / "run"
    run, state = start_run(recipe, run_dir)
    fit(run, state)
    (rollback,) = incidents(run_dir, "rollback")
    assert (rollback["step"], rollback["to_step"]) == (27, 20)
    assert rollback["checkpoint"] == "checkpoints/step-00000020"
    assert rollback["data_passed_over"] == [20, 27]
    assert (state.step, state.data_offset, state.tokens) == (40, 7, 40 * BATCH * LENGTH)
    assert [line["step"] for line in metrics.read(run_dir) if "grad_norm" in line] == (
        list(range(1, 41)) if log_every == 1 else [1, 40]
    )
    assert [step for step, _ in store.list_steps(run_dir)] == [10, 20, 30, 40]
    spikes = incidents(run_dir, "spike")
    told = [each for spike in spikes for each in (spike, *spike["others"])]
    # After the rollback, steps 21 and 22 meet what is left of the bad data, at places 27 and 28.
    assert sorted((each["data_position"], each["step"]) for each in told if each["step"] > 20) == [
        (24, 25), (25, 26), (26, 27), (27, 21), (28, 22),
    ]  # fmt: skip
    reported, problems = list_incidents(run_dir)
    assert problems == []
    assert [each.steps for each in reported if each.kind == "rollback"] == [(20, 27)]
    steps = [step for each in reported if each.kind == "spike" for step in each.steps]
    assert sorted(steps) == sorted(each["step"] for each in told)
    assert all("is above" in each.reason for each in reported if each.kind == "spike")

    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    start = resume_run(copy / "checkpoints/step-00000020", [], [])
    finished = by_hand(recipe, data, start, position=27)
    assert all(
        torch.equal(a, b)
        for a, b in zip(everything(run.context), everything(finished.context), strict=True)
    )


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_rollback_equals_a_resume_with_an_offset(
    tmp_path: Path, make_recipe: MakeRecipe, regular: Path, dtype: str
):
    """Under fp16 the bad batches are not finite, and lower the loss scale: it is put back too."""
    token = unused_token(regular) if dtype == "fp16" else None
    data = poisoned(regular, tmp_path / "data", [24, 25, 26], token)
    run_dir, copy = tmp_path / "run", tmp_path / "copy"
    recipe = make_recipe(*SPIKES, *UNTIED, f"precision.dtype={dtype}", data=data)
    run, state = start_run(recipe, run_dir)
    if token is not None:
        ruin(run, token)
    fit(run, state)
    assert len(incidents(run_dir, "rollback")) == 1
    shutil.copytree(run_dir, copy)
    run, resumed = resume_run(copy / "checkpoints/step-00000020", [], [])
    resumed.data_offset = 7
    fit(run, resumed)
    last = "checkpoints/step-00000040"
    one, other = tensors(run_dir / last), tensors(copy / last)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert state.scaler == resumed.scaler


@pytest.mark.parametrize(
    ("dtype", "every", "points"), [("fp32", 1, (26, 25, 23)), ("fp16", 10, (30, 20, 10))]
)
def test_a_resume_after_a_rollback_is_bit_exact(
    tmp_path: Path,
    make_recipe: MakeRecipe,
    regular: Path,
    dtype: str,
    every: int,
    points: tuple[int, ...],
):
    """From before the rollback, where it happens again, from among the spikes and from after it;
    under fp16 also while a scale that started too high is being lowered."""
    data = poisoned(regular, tmp_path / "data", [24, 25, 26, 27])
    recipe = make_recipe(*SPIKES, f"checkpoint.every_steps={every}", f"precision.dtype={dtype}",
                         data=data)  # fmt: skip
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run, state = start_run(recipe, straight)
    if dtype == "fp16":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**23)
        run = replace(run, context=replace(run.context, scaler=scaler))
    fit(run, state)
    assert (state.skipped > 2) == (dtype == "fp16")
    assert state.data_offset == (27 - 26 if every == 1 else 27 - 20)
    shutil.copytree(straight, resumed)
    for step in points:
        rewind(resumed, step)
        run, state = resume_run(resumed, [], [])
        assert state.step == step
        fit(run, state)
        assert_same_run(straight, resumed, 40)
        assert len(incidents(resumed)) == len(incidents(straight))


def test_nonfinite_steps_count_as_spikes(tmp_path: Path, make_recipe: MakeRecipe, regular: Path):
    """A token whose embedding is near float32's limit: single batches of it are skipped, three in
    a row roll back, and no weight or moment ever learns of it."""
    token = unused_token(regular)
    data = poisoned(regular, tmp_path / "data", [3, 14, 24, 25, 26], token)
    run, state = start_run(make_recipe(*SPIKES, *UNTIED, data=data), tmp_path / "run")
    ruin(run, token)
    fit(run, state)
    bad = incidents(tmp_path / "run", "nonfinite")
    assert [incident["step"] for incident in bad] == [4, 15, 25, 26, 27]
    assert all(incident["loss"] == incident["grad_norm"] == "nan" for incident in bad)
    assert state.data_offset == 7
    assert all(value.isfinite().all() for value in everything(run.context))


def test_without_a_checkpoint_the_run_ends(tmp_path: Path, make_recipe: MakeRecipe, regular: Path):
    data = poisoned(regular, tmp_path / "data", [24, 25, 26])
    recipe = make_recipe(*SPIKES, "checkpoint.every_steps=100", data=data)
    run, state = start_run(recipe, tmp_path / "run")
    with pytest.raises(Diverged, match=r"3 spikes in a row up to step 27.*no checkpoint to roll"):
        fit(run, state)
    assert store.list_steps(tmp_path / "run") == []


@pytest.mark.parametrize("every", [1, 10])
def test_rollbacks_that_do_not_help_end_the_run(
    tmp_path: Path, make_recipe: MakeRecipe, regular: Path, every: int
):
    """Also where a checkpoint is saved at every step: those among spikes are no way out."""
    data = poisoned(regular, tmp_path / "data", range(24, 60))
    recipe = make_recipe(*SPIKES, f"checkpoint.every_steps={every}", data=data)
    run, state = start_run(recipe, tmp_path / "run")
    with pytest.raises(Diverged, match=r"after 3 rollbacks to step-000000.*did not help"):
        fit(run, state)
    assert len(incidents(tmp_path / "run", "rollback")) == 3
    assert state.step < 40


def test_a_rollback_skips_damaged_checkpoints(
    tmp_path: Path, make_recipe: MakeRecipe, regular: Path
):
    data = poisoned(regular, tmp_path / "data", [24, 25, 26])
    fit(*start_run(make_recipe(*SPIKES, "train.steps=20", data=data), tmp_path / "run"))
    run, state = resume_run(tmp_path / "run", ["train.steps=40"], [])
    (tmp_path / "run/checkpoints/step-00000020/state.json").write_text("{}")
    state.dataset = {"content": "as if changed by --allow-change data"}
    fit(run, state)
    assert incidents(tmp_path / "run", "rollback")[0]["to_step"] == 10
    assert (tmp_path / "run/checkpoints/step-00000020.aside-1").exists()
    assert [step for step, _ in store.list_steps(tmp_path / "run")] == [10, 20, 30, 40]
    assert state.step == 40
    assert state.dataset == {"content": "as if changed by --allow-change data"}


def test_each_rollback_that_helps_is_forgotten(
    tmp_path: Path, make_recipe: MakeRecipe, regular: Path
):
    """Five single spikes, each rolled back at once, with a new checkpoint before the next."""
    data = poisoned(regular, tmp_path / "data", [34, 52, 70, 88, 106])
    recipe = make_recipe(*SPIKES, "train.steps=80", "guard.rollback_after=1",
                         "guard.spike_sigma=12", data=data)  # fmt: skip
    run, state = start_run(recipe, tmp_path / "run")
    fit(run, state)
    rollbacks = incidents(tmp_path / "run", "rollback")
    assert all(each["rollbacks_in_a_row"] == 1 for each in rollbacks)
    assert state.rollbacks == 0
    skipped_checkpoints = sorted(each["data_passed_over"] for each in rollbacks)
    assert {34, 52, 70, 88, 106} <= {beyond - 1 for _, beyond in skipped_checkpoints}
    assert state.data_offset == sum(beyond - first for first, beyond in skipped_checkpoints)


def test_a_stop_while_a_rollback_is_due(tmp_path: Path, make_recipe: MakeRecipe, regular: Path):
    """SIGTERM in step 28, after three spikes that the host has not looked at yet."""
    data = poisoned(regular, tmp_path / "data", [24, 25, 26])
    recipe = make_recipe(*SPIKES, "log.every_steps=1000", data=data)
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    fit(*start_run(recipe, straight))
    run, state = start_run(recipe, stopped)
    in_micro_batches(run, {2 * 27: stop})  # two micro-batches per step
    with pytest.raises(Stopped, match="stopped by SIGTERM at step 20 of 40, everything is saved"):
        fit(run, state)
    assert len(incidents(stopped, "rollback")) == 1
    fit(*resume_run(stopped, [], []))
    assert_same_run(straight, stopped, 40)
