"""The findings of a search for a learning rate: as a picture and a table, and as JSON."""

import math
import shlex
from typing import Any

from minigpt_cli.analysis.lr_find import LrFindings, with_lr
from minigpt_cli.analysis.picture import Ticks, draw_curve
from minigpt_cli.analysis.range_test import RangeTest, next_candidate
from minigpt_cli.core.text_table import text_table
from minigpt_cli.recipe import Recipe

FORMAT = "minigpt-lr-find-1"
_ROWS = 12  # of the table in the picture's place


def findings_json(recipe: Recipe, findings: LrFindings) -> dict[str, Any]:
    """Return the findings as a JSON object; a loss that is not there is null."""
    test, best = findings.range_test, findings.best
    return {
        "format": FORMAT,
        "recipe": recipe.name,
        "advice": None if best is None else _settings(recipe, best.lr),
        "val_loss": None if best is None else best.val_loss,
        "noise": noise(findings),
        "other_seed": [
            {"settings": _settings(recipe, each.lr), "val_loss": each.val_loss}
            for each in findings.repeats
        ],
        "budget": findings.budget,
        "candidates": [
            {
                "settings": _settings(recipe, each.lr),
                "val_loss": each.val_loss,
                "train_loss": each.train_loss,
                "is_recipes": each.lr == recipe.optimizer.lr,
                "within_noise": each.lr in within_noise(findings),
            }
            for each in findings.candidates
        ],
        "range_test": {
            "setting": "optimizer.lr",
            "rates": test.rates,
            "losses": test.losses,
            "smoothed": test.smoothed,
            "steepest": test.steepest,
            "diverged": test.diverged,
        },
    }


def findings_text(recipe: Recipe, recipe_file: str, findings: LrFindings, width: int) -> str:
    """Return the findings for a person.

    Args:
        recipe: as it was loaded.
        recipe_file: its name on the command line.
        findings: of ``find_lr``.
        width: columns of the terminal.
    """
    test = findings.range_test
    if test.steepest is None:
        fall = "the loss falls nowhere, so the candidates are around the recipe's rate"
    else:
        fall = f"its steepest fall is at {test.steepest:.2g}"
    parts = [
        f"Range test: training loss over optimizer.lr, smoothed; {fall}.",
        loss_curve(test, width),
        f"Each candidate, trained for {findings.budget} steps under the recipe's schedule:",
        _candidate_table(recipe, findings),
        advice(recipe, recipe_file, findings),
    ]
    return "\n".join(parts)


def advice(recipe: Recipe, recipe_file: str, findings: LrFindings) -> str:
    """Return what to do, in a few sentences."""
    best, lr = findings.best, recipe.optimizer.lr
    if best is None:
        return "No advice: all candidates diverged."
    repeated = ", ".join(f"{each.lr:g} -> {_shown(each.val_loss)}" for each in findings.repeats)
    lines = [f"With another seed: {repeated}."]
    most = noise(findings)
    if most is None:
        lines.append("The best rate is close to those that diverge: take a lower one.")
    else:
        lines.append(f"So differences up to {most:.4f} may be chance.")
    untried = next_candidate([each.lr for each in findings.candidates], best.lr)
    if untried is not None:
        where = "lower" if untried < best.lr else "higher"
        lines.append(
            f"The best rate may be {where} still: search again with this one in the recipe."
        )
    near = within_noise(findings)
    if near:
        rates = ", ".join(f"{rate:g}" for rate in near)
        lines.append(f"As good as the best, within that: {rates}.")
    values = " and ".join(
        f"{name} = {value:g}" for name, value in _settings(recipe, best.lr).items()
    )
    if best.lr == lr:
        lines.append(f"Advice: keep {values}")
        return "\n".join(lines)
    if lr in near:
        lines.append("So the recipe's rate may stay as it is.")
    lines.append(f"Advice: set {values}")
    given = " ".join(
        f"--set {name}={value:g}" for name, value in _settings(recipe, best.lr).items()
    )
    command = "pretrain" if recipe.lora is None else "finetune-lora"
    lines.append(f"  minigpt {command} {shlex.quote(recipe_file)} {given}")
    return "\n".join(lines)


def noise(findings: LrFindings) -> float | None:
    """Return the largest difference that another seed made; None if one diverged."""
    losses = {each.lr: each.val_loss for each in findings.candidates}
    changes = []
    for each in findings.repeats:
        before = losses[each.lr]
        if before is None or each.val_loss is None:
            return None
        changes.append(abs(each.val_loss - before))
    return max(changes, default=None)


def within_noise(findings: LrFindings) -> list[float]:
    """Return the other rates whose loss is as good as the best one's, within the noise."""
    best, most = findings.best, noise(findings)
    if best is None or best.val_loss is None or most is None:
        return []
    return [
        each.lr
        for each in findings.candidates
        if each.val_loss is not None and each is not best and each.val_loss <= best.val_loss + most
    ]


def loss_curve(test: RangeTest, width: int) -> str:
    """Return the smoothed loss over the rate as a picture; a table where that can't be drawn.

    Args:
        test: the range test.
        width: columns of the terminal.
    """
    if len(test.rates) < 3:
        return "  (it diverged at once)"
    # A loss that explodes would leave one line for everything else.
    low, start = min(test.smoothed), test.smoothed[0]
    most = max(start, low) + 0.5 * max(start - low, 1e-3)
    losses = [min(loss, most) for loss in test.smoothed]
    x = [math.log10(rate) for rate in test.rates]  # plotext's own log scale is for whole decades
    decades = range(math.ceil(x[0]), math.floor(x[-1]) + 1)
    ticks: Ticks = (decades, [f"1e{power}" for power in decades])
    if len(decades) < 2:
        ticks = ([x[0], x[-1]], [f"{test.rates[i]:.1e}" for i in (0, -1)])
    mark = None if test.steepest is None else math.log10(test.steepest)
    return draw_curve(x, losses, width, ticks, mark=mark) or _curve_table(test)


def _curve_table(test: RangeTest) -> str:
    """Return a few points of the curve."""
    count = len(test.rates)
    picked = sorted({round(place * (count - 1) / (_ROWS - 1)) for place in range(_ROWS)})
    rows = [[f"{test.rates[i]:.1e}", f"{test.smoothed[i]:.4f}"] for i in picked]
    return text_table(["optimizer.lr", "loss"], rows)


def _candidate_table(recipe: Recipe, findings: LrFindings) -> str:
    rows = []
    for each in findings.candidates:
        notes = [
            "the best" if each is findings.best else "",
            "the recipe's" if each.lr == recipe.optimizer.lr else "",
        ]
        losses = [each.train_loss, each.val_loss]
        rows.append(
            [
                *(f"{value:g}" for value in _settings(recipe, each.lr).values()),
                *map(_shown, losses),
                ", ".join(filter(None, notes)),
            ]
        )
    names = list(_settings(recipe, recipe.optimizer.lr))
    return text_table([*names, "train loss", "val loss", ""], rows)


def _shown(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


def _settings(recipe: Recipe, lr: float) -> dict[str, float]:
    """Return the settings that stand for a rate, with their values."""
    changed = with_lr(recipe, lr).optimizer
    if changed.name == "muon" and changed.muon_lr is not None:
        return {"optimizer.lr": changed.lr, "optimizer.muon_lr": changed.muon_lr}
    return {"optimizer.lr": changed.lr}
