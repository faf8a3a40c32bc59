"""A candidate is what a real run with its rate would be; what is said about the findings."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from minigpt_cli.analysis.lr_find import (
    Candidate,
    LrFindings,
    LrSearch,
    find_lr,
    short_schedule,
    with_lr,
)
from minigpt_cli.analysis.lr_report import advice, findings_json, findings_text, loss_curve
from minigpt_cli.analysis.range_test import read_range_test, rising_rates
from minigpt_cli.recipe import Recipe, ScheduleSettings
from minigpt_cli.train.loop import fit
from minigpt_cli.train.start import start_run

SEARCH = LrSearch(first=1e-4, last=1.0, steps=20, budget=100)


def silent(name: str, done: int, total: int) -> None:
    assert 0 < done <= total


def test_a_candidate_is_a_real_run(make_recipe: Callable[..., Recipe], tmp_path: Path):
    """With dropout and accumulation; the budget is the whole recipe, so the schedule is too."""
    settings = ["optimizer.name=muon", "model.dropout=0.1", "optimizer.muon_lr=0.01"]
    recipe = make_recipe(*settings)
    findings = find_lr(recipe, SEARCH, silent)
    assert findings.budget == 12
    assert 3 <= len(findings.candidates) <= 6
    (own,) = (each for each in findings.candidates if each.lr == 3e-3)
    other = next(each for each in findings.candidates if each.lr != 3e-3)
    for candidate in (own, other):
        changed = with_lr(recipe, candidate.lr).optimizer
        rates = [f"optimizer.lr={changed.lr}", f"optimizer.muon_lr={changed.muon_lr}"]
        run, state = start_run(make_recipe(*settings, *rates), tmp_path / f"{candidate.lr}")
        fit(run, state)
        assert state.val_loss is not None
        assert candidate.val_loss == pytest.approx(state.val_loss, rel=1e-5)
    assert findings.best is not None
    assert findings.best.val_loss == min(each.val_loss or 99 for each in findings.candidates)
    assert findings.repeats[0].lr == findings.best.lr
    assert len(findings.repeats) == 2


def test_everything_diverges(make_recipe: Callable[..., Recipe]):
    recipe = make_recipe("optimizer.lr=1e18")
    findings = find_lr(recipe, LrSearch(1e17, 1e19, steps=10, budget=12), silent)
    assert findings.best is None
    assert findings.range_test.diverged
    assert [each.val_loss for each in findings.candidates] == [None] * len(findings.candidates)
    assert advice(recipe, "r.toml", findings) == "No advice: all candidates diverged."
    assert json.loads(json.dumps(findings_json(recipe, findings)))["advice"] is None
    assert "diverged" in findings_text(recipe, "r.toml", findings, 80)


def test_schedule():
    schedule = ScheduleSettings(name="step", warmup_steps=40, milestones=(500, 900))
    assert short_schedule(schedule, 1000, 1000) is schedule
    short = short_schedule(schedule, 1000, 100)
    assert (short.warmup_steps, short.milestones) == (25, (50, 90))
    assert short_schedule(schedule, 1000, 400).warmup_steps == 40


def test_muon_keeps_the_ratio_of_its_rates(make_recipe: Callable[..., Recipe]):
    recipe = make_recipe("optimizer.name=muon", "optimizer.lr=0.01", "optimizer.muon_lr=0.02")
    changed = with_lr(recipe, 0.003).optimizer
    assert (changed.lr, changed.muon_lr) == pytest.approx((0.003, 0.006))
    recipe = make_recipe("optimizer.name=muon", "optimizer.muon_lr=0.0123456")
    assert with_lr(recipe, recipe.optimizer.lr) == recipe
    alone = with_lr(make_recipe("optimizer.name=muon"), 0.003).optimizer
    assert (alone.lr, alone.muon_lr) == (0.003, None)


def findings(*losses: float | None, repeats: tuple[float | None, ...]) -> LrFindings:
    """Candidates at 0.001, 0.003, 0.01 and 0.03; the best and the one at 0.003 repeated."""
    rates = [0.001, 0.003, 0.01, 0.03][: len(losses)]
    candidates = [Candidate(lr, loss, loss) for lr, loss in zip(rates, losses, strict=True)]
    best = min(candidates, key=lambda each: each.val_loss or 99)
    repeated = [best, candidates[1]]
    test = read_range_test(rising_rates(1e-4, 1, 50), [5 - 0.01 * i for i in range(50)], False)
    return LrFindings(
        test, 100, candidates, best,
        [replace(each, val_loss=loss) for each, loss in zip(repeated, repeats, strict=True)],
    )  # fmt: skip


def test_advice(make_recipe: Callable[..., Recipe]):
    recipe = make_recipe()  # with lr 0.003
    clear = advice(recipe, "my recipe.toml", findings(4.0, 3.5, 3.0, 3.4, repeats=(3.01, 3.52)))
    assert "differences up to 0.0200 may be chance" in clear
    assert clear.endswith(
        "Advice: set optimizer.lr = 0.01\n"
        "  minigpt pretrain 'my recipe.toml' --set optimizer.lr=0.01"
    )
    noisy = advice(recipe, "r.toml", findings(4.0, 3.02, 3.0, 3.4, repeats=(3.03, 3.01)))
    assert "As good as the best, within that: 0.003." in noisy
    assert "So the recipe's rate may stay as it is." in noisy
    kept = advice(recipe, "r.toml", findings(4.0, 3.0, 3.5, repeats=(3.03, 3.01)))
    assert kept.endswith("Advice: keep optimizer.lr = 0.003")
    edge = advice(recipe, "r.toml", findings(4.0, 3.6, 3.4, 3.0, repeats=(None, 3.6)))
    assert "may be higher still" in edge
    assert "0.03 -> diverged" in edge
    assert "take a lower one" in edge


def test_advice_with_two_rates(make_recipe: Callable[..., Recipe]):
    recipe = make_recipe("optimizer.name=muon", "optimizer.muon_lr=0.006")
    found = findings(4.0, 3.5, 3.0, 3.4, repeats=(3.01, 3.52))
    assert advice(recipe, "r.toml", found).endswith(
        "Advice: set optimizer.lr = 0.01 and optimizer.muon_lr = 0.02\n"
        "  minigpt pretrain r.toml --set optimizer.lr=0.01 --set optimizer.muon_lr=0.02"
    )
    result = findings_json(recipe, found)
    assert result["advice"] == {"optimizer.lr": 0.01, "optimizer.muon_lr": 0.02}
    assert [each["is_recipes"] for each in result["candidates"]] == [False, True, False, False]
    text = findings_text(recipe, "r.toml", found, 80)
    assert "optimizer.lr  optimizer.muon_lr  train loss  val loss" in text
    assert "       0.003              0.006      3.5000    3.5000  the recipe's\n" in text


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_picture_fits(width: int, monkeypatch: pytest.MonkeyPatch):
    rates = rising_rates(1e-5, 1.0, 100)
    losses = [8 - 3 * i / 60 if i < 60 else 5.0 + (i - 60) ** 2 for i in range(100)]
    test = read_range_test(rates, losses, diverged=True)
    lines = loss_curve(test, width).splitlines()
    assert max(map(len, lines)) == min(width, 100)
    assert len(lines) == 15
    assert lines[-1].split() == ["1e-5", "1e-4", "1e-3", "1e-2", "1e-1", "1e0"]
    assert "\x1b" not in "".join(lines)
    # The explosion is cut off, so that the fall fills most of the picture.
    assert sum(any("\u2800" < c < "\u2900" for c in line[: width // 2]) for line in lines) > 5
    monkeypatch.setitem(sys.modules, "plotext", None)
    table = loss_curve(test, width).splitlines()
    assert table[0].split() == ["optimizer.lr", "loss"]
    assert len(table) == 13
