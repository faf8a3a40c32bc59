"""The loop's own bookkeeping: time, intervals, the best, early stop."""

import copy
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minigpt_cli.checkpoint import integrity, store
from minigpt_cli.core.errors import Diverged
from minigpt_cli.data.loader import Batch
from minigpt_cli.model.gpt import GPT
from minigpt_cli.recipe import Recipe
from minigpt_cli.report import metrics
from minigpt_cli.train import loop
from minigpt_cli.train.log_step import Clock
from minigpt_cli.train.loop import fit
from minigpt_cli.train.samples import Prompts
from minigpt_cli.train.schedule import lr_factor
from minigpt_cli.train.start import resume_run, start_run
from tests.helpers.events import in_micro_batches
from tests.helpers.file_limit import limit_files
from tests.helpers.runs import rewind

MakeRecipe = Callable[..., Recipe]


def test_clock():
    """Bounds that hold on however busy a machine: sleep() is never shorter than asked for."""
    clock = Clock()
    began = time.perf_counter()
    clock.start()
    time.sleep(0.02)
    clock.start()  # already running: nothing is lost
    time.sleep(0.02)
    clock.pause()
    time.sleep(0.05)
    clock.start()
    lap = clock.lap()
    assert 0.04 <= lap <= time.perf_counter() - began - 0.05
    assert clock.total == lap
    assert clock.lap() == 0


def test_throughput_is_that_of_the_whole_run(tmp_path: Path, make_recipe: MakeRecipe):
    """Steps and evaluations that are known to take some time: those count, these don't."""
    run, state = start_run(make_recipe("log.every_steps=3", "eval.every_steps=2"), tmp_path)

    def slow_batches(step: int) -> Batch:
        time.sleep(0.01)
        return run.batches(step)

    evaluated_at = []

    class SlowPrompts(Prompts):
        def complete(self, model: GPT) -> Iterator[tuple[str, str]]:
            evaluated_at.append(time.perf_counter())
            time.sleep(0.05)
            return super().complete(model)

    began = time.perf_counter()
    prompts = SlowPrompts(**vars(run.prompts))
    fit(replace(run, batches=slow_batches, prompts=prompts), state)
    lines = [line for line in metrics.read(tmp_path) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 3, 6, 9, 12]
    assert [line["tokens"] for line in lines] == [256 * step for step in (1, 3, 6, 9, 12)]
    steps = [1, 2, 3, 3, 3]
    seconds = [256 * n / line["tokens_per_second"] for n, line in zip(steps, lines, strict=True)]
    assert all(lap >= 0.01 * n for n, lap in zip(steps, seconds, strict=True))
    assert len(evaluated_at) == 6
    assert sum(seconds) <= evaluated_at[-1] - began - 5 * 0.05
    assert all(line["mfu"] is None for line in lines)  # a CPU's peak is not known


def test_logged_rates_follow_the_schedule(tmp_path: Path, make_recipe: MakeRecipe):
    fit(*start_run(make_recipe("schedule.name=linear", "schedule.min_lr_ratio=0"), tmp_path))
    rates = [line["lr"] for line in metrics.read(tmp_path) if "lr" in line]
    assert rates == pytest.approx([1e-3, 2e-3, 3e-3, *(3e-3 * (9 - n) / 9 for n in range(1, 10))])


def test_a_run_is_a_plain_loop_of_torchs_own_adamw(tmp_path: Path, make_recipe: MakeRecipe):
    """From the first update on, whose size tells how many AdamW believes there were before."""
    recipe = make_recipe("train.steps=6", "precision.dtype=fp64", "eval.every_steps=100")
    run, state = start_run(recipe, tmp_path)
    model = copy.deepcopy(run.context.model)
    batches = [[part.clone() for part in run.batches(step)[:2]] for step in range(6)]
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        betas=recipe.optimizer.betas, fused=False, foreach=False,
    )  # fmt: skip
    for step, (inputs, targets) in enumerate(batches):
        for group in adamw.param_groups:
            group["lr"] = recipe.optimizer.lr * lr_factor(recipe.schedule, 6, step + 1)
        adamw.zero_grad()
        (model(inputs, targets) / targets.numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_norm)
        adamw.step()
    fit(run, state)
    for ours, plain in zip(run.context.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_the_last_step_is_saved_once(
    tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str], asynchronous: str
):
    fit(*start_run(make_recipe(f"checkpoint.asynchronous={asynchronous}"), tmp_path))
    assert capsys.readouterr().err.count("step-00000012") == 1


def test_evaluations_and_the_best_checkpoint(tmp_path: Path, make_recipe: MakeRecipe):
    recipe = make_recipe(
        "checkpoint.every_steps=5", "checkpoint.keep_last=1", "eval.every_steps=2",
        "schedule.name=step", "schedule.milestones=[4]", "schedule.gamma=1000",  # ruined at step 5
    )  # fmt: skip
    run, state = start_run(recipe, tmp_path)
    fit(run, state)
    evaluations = [line for line in metrics.read(tmp_path) if "val_loss" in line]
    assert [line["step"] for line in evaluations] == [2, 4, 6, 8, 10, 12]
    for line in evaluations:
        assert line["val_perplexity"] == pytest.approx(math.exp(line["val_loss"]))
        assert line["val_bits_per_byte"] > 0
    best = min(evaluations, key=lambda line: line["val_loss"])
    assert (state.best_step, state.best_val_loss) == (best["step"], best["val_loss"])
    assert best["step"] == 4
    assert [step for step, _ in store.list_steps(tmp_path)] == [4, 12]


def test_early_stop_ends_the_run_for_good(
    tmp_path: Path, make_recipe: MakeRecipe, license_dataset: Path
):
    """At a learning rate that makes it worse, two evaluations without a new best are enough."""
    recipe = make_recipe(
        f"data.path={license_dataset}",
        "train.steps=40", "optimizer.lr=3", "schedule.warmup_steps=0", "schedule.name=constant",
        "eval.patience=2", "eval.every_steps=2", "optimizer.clip_norm=0",
    )  # fmt: skip
    run, state = start_run(recipe, tmp_path)
    fit(run, state)
    assert state.evaluations_since_best == 2
    assert state.step < 40
    ended = state.step
    run, state = resume_run(tmp_path, [], [])
    fit(run, state)
    assert state.step == ended


def test_prompts_are_completed_at_each_evaluation(
    tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
):
    recipe = make_recipe("eval.prompts=['def f', 'import ']", "eval.prompt_tokens=5")
    fit(*start_run(recipe, tmp_path))
    shown = capsys.readouterr().err
    assert shown.count("  | def f") == 3
    assert shown.count("  | import ") == 3
    lines = metrics.read(tmp_path, "samples.jsonl")
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (step, prompt) for step in (4, 8, 12) for prompt in ("def f", "import ")
    ]
    assert f"  | def f{lines[-2]['completion']}".split("\n")[0] in shown
    steps = metrics.read(tmp_path)
    seconds = [line["seconds"] for line in steps if "loss" in line]
    assert seconds == sorted(seconds)
    assert steps[0]["memory_bytes"] > 1e8
    assert steps[0]["time"] > 1.7e9
    rewind(tmp_path, 4)
    fit(*resume_run(tmp_path, [], []))
    again = metrics.read(tmp_path, "samples.jsonl")
    assert [line | {"time": 0} for line in again] == [line | {"time": 0} for line in lines]
    steps = metrics.read(tmp_path)
    later = [line["seconds"] for line in steps if "loss" in line]
    assert later == sorted(later)
    assert later[:3] == seconds[:3]


def test_divergence_saves_nothing(tmp_path: Path, make_recipe: MakeRecipe):
    recipe = make_recipe("checkpoint.every_steps=4", "log.every_steps=100", "precision.dtype=fp32")
    run, state = start_run(recipe, tmp_path)
    weight = run.context.model.layers[0].mlp.up_proj.weight
    calls = iter(range(1000))

    def poison(grad: torch.Tensor) -> torch.Tensor:
        micro_batch = next(calls)  # two a step: from step 6 on
        return grad * math.nan if micro_batch >= 10 else grad

    weight.register_hook(poison)
    with pytest.raises(Diverged, match=r"at step 6; .*step-00000004") as caught:
        fit(run, state)
    assert caught.value.exit_code == 3
    assert [step for step, _ in store.list_steps(tmp_path)] == [4]


def test_saving_by_the_clock(tmp_path: Path, make_recipe: MakeRecipe):
    recipe = make_recipe("checkpoint.every_minutes=1e-9", "eval.every_steps=100")
    fit(*start_run(recipe, tmp_path))
    assert [step for step, _ in store.list_steps(tmp_path)] == list(range(1, 13))


def test_the_step_in_which_the_time_comes_is_saved(
    tmp_path: Path, make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
):
    clock = [0.0]
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    recipe = make_recipe(
        "checkpoint.every_minutes=1", "checkpoint.every_steps=100", "eval.every_steps=100"
    )
    run, state = start_run(recipe, tmp_path)
    micro_batches = run.recipe.train.global_batch_size // run.context.micro_batch_size
    in_micro_batches(run, {2 * micro_batches: lambda: clock.append(clock.pop() + 61)})
    fit(run, state)
    assert [step for step, _ in store.list_steps(tmp_path)] == [3, 12]


def test_a_save_waits_for_the_save_before_it(
    tmp_path: Path,
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    fsync = os.fsync

    def slow_disk(descriptor: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.3)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", slow_disk)
    recipe = make_recipe("checkpoint.every_steps=1", "train.steps=3", "schedule.warmup_steps=0")
    fit(*start_run(recipe, tmp_path))
    said = capsys.readouterr().err
    assert said.count("s for the save before this one") == 2
    assert said.count("saved ") == 3
    assert [step for step, _ in store.list_steps(tmp_path)] == [1, 2, 3]
    for _, path in store.list_steps(tmp_path):
        assert integrity.verify(path) == []


def test_a_failed_save_is_tried_again(
    tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
):
    """No file may be larger than 50 kB in step 8; a checkpoint's tensors need more."""
    run, state = start_run(make_recipe("checkpoint.asynchronous=false"), tmp_path)
    in_micro_batches(run, {2 * 7: lambda: limit_files(50_000), 2 * 8: lambda: limit_files(None)})
    fit(run, state)
    said = capsys.readouterr().err
    assert said.count("training goes on and saves again at the next interval") == 1
    assert "step-00000008: the checkpoint could not be written: File too large" in said
    assert [step for step, _ in store.list_steps(tmp_path)] == [4, 12]
