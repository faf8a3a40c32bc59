"""Spikes and overflows: what is called off, against NumPy."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt_cli.checkpoint import store
from minigpt_cli.core.errors import Diverged
from minigpt_cli.recipe import GuardSettings, Recipe
from minigpt_cli.report import metrics
from minigpt_cli.train.checkpointing import all_finite
from minigpt_cli.train.guard import MAX_RECORDS, new_guard, watch_step
from minigpt_cli.train.guard_report import (
    guard_to_json,
    overflow_rate,
    overflow_warning,
    read_guard,
    restore_guard,
)
from minigpt_cli.train.log_step import StepLog
from minigpt_cli.train.loop import fit
from minigpt_cli.train.start import start_run
from minigpt_cli.train.step import train_step
from tests.helpers.poison import SPIKES, incidents, poisoned
from tests.helpers.runs import tensors
from tests.helpers.steps import CPU, batch, everything, tiny_context

MakeRecipe = Callable[..., Recipe]


def spikes_by_the_rule(
    losses: list[float], norms: list[float], sigma: float, window: int
) -> list[int]:
    """The steps (from 1) whose loss or gradient norm lies more than ``sigma`` standard deviations
    above the mean of the last ``window`` that were no spikes; half a window is needed to tell."""
    kept: list[tuple[float, float]] = []
    found = []
    for step, pair in enumerate(zip(losses, norms, strict=True), 1):
        last = np.array(kept[-window:])
        limits = (
            last.mean(0) + sigma * last.std(0, ddof=1) if len(last) >= window // 2 else math.inf
        )
        if (np.array(pair) > limits).any():
            found.append(step)
        else:
            kept.append(pair)
    return found


def curve_of(run: Path, name: str) -> list[float]:
    return [line[name] for line in metrics.read(run) if "grad_norm" in line]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_spikes_are_those_of_the_rule(
    tmp_path: Path, make_recipe: MakeRecipe, regular: Path, name: str
):
    data = poisoned(regular, tmp_path / "data", [24, 25, 31])
    recipe = make_recipe(*SPIKES, f"optimizer.name={name}", "guard.rollback_after=100", data=data)
    fit(*start_run(recipe, tmp_path / "run"))
    losses, norms = (curve_of(tmp_path / "run", key) for key in ("loss", "grad_norm"))
    assert len(losses) == 40
    expected = spikes_by_the_rule(losses, norms, sigma=6, window=16)
    assert {25, 26, 32} <= set(expected)
    assert len(expected) < 8  # and ordinary steps are none
    assert [incident["step"] for incident in incidents(tmp_path / "run")] == expected


def test_the_rule_over_many_steps():
    """The device's verdicts on random numbers with outliers and trends equal NumPy's."""
    random = np.random.default_rng(3)
    g = new_guard(CPU, GuardSettings(spike_sigma=2.5, spike_window=9, rollback_after=1000))
    losses = 3 + random.normal(size=400) + 9 * (random.random(400) < 0.05)
    norms = random.gamma(2.0, size=400)
    called_off = []
    for step, pair in enumerate(zip(losses, norms, strict=True), 1):
        loss, norm = (torch.tensor(value, dtype=torch.float64) for value in pair)
        if watch_step(g, step, loss, norm, local_loss=loss, scale=None):
            called_off.append(step)
    expected = spikes_by_the_rule(losses.tolist(), norms.tolist(), sigma=2.5, window=9)
    assert 30 < len(expected) < 150
    assert called_off == expected
    seen = read_guard(g)
    assert seen.rollback_at == 0
    assert seen.bad == len(expected)
    assert [bad.step for bad in seen.steps] == expected[:MAX_RECORDS]


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_spike_changes_nothing(name: str):
    settings = GuardSettings(spike_sigma=4, spike_window=8)
    one, other = (
        replace(tiny_context(torch.float32, name=name), guard=new_guard(CPU, settings))
        for _ in range(2)
    )
    for step in range(7):
        for t in (one, other):
            train_step(t, batch(step), step, 0.02)
    before = everything(one)
    weight = one.model.layers[0].mlp.up_proj.weight
    hook = weight.register_hook(lambda grad: grad * 1e6)  # finite, and far too high
    train_step(one, batch(7), 7, 0.02)
    hook.remove()
    (spike,) = read_guard(one.guard).steps
    assert spike.is_finite
    assert (spike.step, spike.grad_norm > 1e3) == (8, True)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(one), strict=True))
    for t in (one, other):  # and the next step is as if nothing had been
        train_step(t, batch(8), 8, 0.02)
    assert read_guard(one.guard).bad == 1
    assert read_guard(other.guard).bad == 0
    after = everything(one)
    assert all(torch.equal(a, b) for a, b in zip(after, everything(other), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_an_fp16_overflow_is_no_spike():
    settings = GuardSettings(spike_sigma=3, spike_window=8, rollback_after=5)
    g = new_guard(CPU, settings)
    one, scale = torch.ones(()), torch.tensor(2.0**16)

    def step(number: int, loss: float, norm: float) -> bool:
        return bool(
            watch_step(g, number, one * loss, one * norm, local_loss=one * loss, scale=scale)
        )

    assert not any(step(n, 4 + 0.1 * (n % 2), 1 + n % 2) for n in range(1, 9))
    assert step(9, 9, 1)  # a spike
    assert step(10, 4, math.inf)  # an overflow
    assert step(11, 9, 1)
    kept = guard_to_json(g, 11)
    assert kept["spikes_in_a_row"] == 2
    assert kept["skips"] == [10]
    assert kept["losses"] == pytest.approx([4.1, 4.0] * 4)
    assert step(12, math.nan, math.inf)  # a loss that is not finite is no overflow
    assert guard_to_json(g, 12)["spikes_in_a_row"] == 3
    assert not step(13, 4, 0.5)
    assert guard_to_json(g, 13)["spikes_in_a_row"] == 0
    assert not read_guard(g).rollback_at


def test_updates_skipped_until_rollback():
    g = new_guard(CPU, GuardSettings(spike_sigma=3, spike_window=8, rollback_after=2))

    def step(number: int, norm: float) -> bool:
        loss = torch.tensor(4 + 0.1 * (number % 3))
        verdict = watch_step(g, number, loss, torch.tensor(norm), local_loss=loss, scale=None)
        return bool(verdict)

    assert not any(step(number, 1 + number % 2) for number in range(1, 9))
    assert [step(number, norm) for number, norm in ((9, 99), (10, 1), (11, 99), (12, 99))] == [
        True, False, True, True,
    ]  # fmt: skip
    assert all(step(number, 1) for number in range(13, 30))
    seen = read_guard(g)
    assert (seen.rollback_at, seen.bad, [bad.step for bad in seen.steps]) == (12, 3, [9, 11, 12])


def test_a_restored_guard_decides_the_same():
    settings = GuardSettings(spike_sigma=2, spike_window=16, rollback_after=4)
    random = np.random.default_rng(1)
    numbers = random.gamma(1.5, size=(3000, 2))
    overflows = random.random(3000) < 0.1
    straight, resumed = new_guard(CPU, settings), new_guard(CPU, settings)
    scale = torch.tensor(2.0)
    for step in range(1, 3001):
        loss, norm = torch.tensor(numbers[step - 1])
        if overflows[step - 1]:
            norm = norm * math.inf
        verdicts = [
            watch_step(g, step, loss, norm, local_loss=loss, scale=scale)
            for g in (straight, resumed)
        ]
        assert verdicts[0] == verdicts[1], step
        assert read_guard(straight).rollback_at == read_guard(resumed).rollback_at
        if read_guard(straight).rollback_at:
            kept = guard_to_json(straight, step) | {"spikes_in_a_row": 0}
            restore_guard(straight, kept, step, 0)
            restore_guard(resumed, kept, step, 0)
        if step % 7 == 0:
            kept = json.loads(json.dumps(guard_to_json(resumed, step)))
            resumed = new_guard(CPU, settings)
            restore_guard(resumed, kept, step, 0)
            assert guard_to_json(resumed, step) == guard_to_json(straight, step)
            assert resumed.overflows_in_a_row == straight.overflows_in_a_row
        expected = overflows[max(0, step - 1000) : step].mean()
        if step % 50 == 0:
            assert overflow_rate(resumed, step) == pytest.approx(expected)


def test_fp16s_skip_rate(
    tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
):
    recipe = make_recipe("precision.dtype=fp16", "train.steps=60", "eval.every_steps=100")
    run, state = start_run(recipe, tmp_path)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    fit(replace(run, context=replace(run.context, scaler=scaler)), state)
    lines = [line for line in metrics.read(tmp_path) if "loss" in line]
    skipped = np.cumsum([line["grad_norm"] is None for line in lines])
    assert skipped[-1] > 12
    assert [line["skip_rate"] for line in lines] == pytest.approx(
        (skipped / np.arange(1, 61)).tolist()
    )
    shown = capsys.readouterr().err
    assert shown.count("warning: fp16 skipped") == 1
    assert "fp16 skipped 11 of the last 11 steps (100.0%)" in shown
    assert not (tmp_path / "incidents").exists()  # overflows are ordinary


def test_warning_returns_after_the_rate_fell(
    tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
):
    run, state = start_run(make_recipe("precision.dtype=fp16"), tmp_path)
    zero, shown = torch.zeros(()), ""
    with run.resources, run.display:
        steps = StepLog(run)
        for step, overflows, warnings in (
            (5000, 51, 1),
            (5010, 60, 1),  # told already
            (6000, 20, 1),
            (7000, 60, 2),
        ):
            run.context.guard.overflow_ring.zero_()[:overflows] = True
            state.step = step
            steps.begin_step()
            steps.write(state, 0.1, zero, zero)
            shown += capsys.readouterr().err
            assert shown.count("warning: fp16 skipped") == warnings


def test_no_skip_rate_without_a_scaler(tmp_path: Path, make_recipe: MakeRecipe):
    fit(*start_run(make_recipe("precision.dtype=fp32", "train.steps=4"), tmp_path))
    assert not any("skip_rate" in line for line in metrics.read(tmp_path))
    assert overflow_warning(0.049, 1000) is None
    assert "51 of the last 1,000 steps (5.1%)" in (overflow_warning(0.051, 1000) or "")
    assert overflow_warning(0.5, 20) is None  # a new run that finds its scale


def test_an_update_that_overflows_is_never_saved(tmp_path: Path, make_recipe: MakeRecipe):
    """Loss and gradient are finite; it is the update that leaves float32's range."""
    recipe = make_recipe(
        "checkpoint.every_steps=1", "train.steps=3", "precision.dtype=fp32",
        "schedule.name=step", "schedule.milestones=[1]", "schedule.warmup_steps=0",
        "schedule.gamma=1e42",
    )  # fmt: skip
    run, state = start_run(recipe, tmp_path)
    with pytest.raises(Diverged, match=r"weights or .* not finite at step 2;.*step-00000001"):
        fit(run, state)
    ((step, checkpoint),) = store.list_steps(tmp_path)
    assert step == 1
    assert all(value.isfinite().all() for value in tensors(checkpoint).values())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_whether_tensors_are_finite(bad: float):
    tensors = [
        torch.randn(3, 4),
        torch.zeros(0, 5),
        torch.tensor([1e300, 1.0], dtype=torch.float64),
    ]
    assert all_finite(tensors)
    assert all_finite([torch.zeros(0)])
    for number, index in ((0, (1, 2)), (2, (1,))):
        poisoned = [tensor.clone() for tensor in tensors]
        poisoned[number][index] = bad
        assert not all_finite(poisoned)
