"""The arithmetic of a range test: NumPy's own fits, and curves whose steepest fall is known."""

import math

import numpy as np
import pytest

from minigpt_cli.analysis.range_test import (
    choose_candidates,
    first_divergence,
    next_candidate,
    read_range_test,
    rising_rates,
    smooth,
)


def test_rates_rise_by_equal_factors():
    rates = rising_rates(1e-5, 1.0, 51)
    assert rates[0] == pytest.approx(1e-5)
    assert rates[-1] == pytest.approx(1.0)
    assert np.diff(np.log(rates)) == pytest.approx(np.full(50, math.log(10) / 10))


def test_smoothing_is_weighted_least_squares():
    x = np.linspace(-3, 2, 30)
    y = np.random.default_rng(0).normal(size=30)
    values, slopes = smooth(x, y, 2.5)
    for i in (0, 1, 14, 29):
        weights = np.exp(-0.5 * ((np.arange(30) - i) / 2.5) ** 2)
        slope, _ = np.polyfit(x, y, 1, w=np.sqrt(weights))
        assert slopes[i] == pytest.approx(slope)
        assert values[i] == pytest.approx(np.average(y, weights=weights))


@pytest.mark.parametrize("steepest", [1e-4, 1e-3, 1e-2])
def test_the_steepest_fall_is_found_in_noise(steepest: float):
    """The fall after a spike at high rates is steeper, but only leads back to where it was."""
    rates = np.array(rising_rates(1e-6, 10.0, 140))
    x = np.log10(rates)
    losses = 8 - 4 / (1 + np.exp(-5 * (x - math.log10(steepest)))) + 6 * (abs(x - 0.4) < 0.25)
    losses += np.random.default_rng(0).normal(0, 0.1, 140)
    test = read_range_test(rates.tolist(), losses.tolist(), diverged=False)
    assert test.steepest is not None
    assert abs(math.log10(test.steepest / steepest)) < 0.15
    assert np.abs(np.array(test.smoothed) - losses)[:100].mean() < 0.15  # before the spike


def test_no_fall_and_an_early_end():
    rates = rising_rates(1e-3, 1.0, 20)
    rising = read_range_test(rates, [5 + 0.1 * i for i in range(20)], diverged=False)
    assert rising.steepest is None
    for count in (0, 1, 2):
        early = read_range_test(rates, [5.0] * count, diverged=True)
        assert (len(early.rates), early.smoothed, early.steepest) == (count, [5.0] * count, None)
    assert len(read_range_test(rates, [5.0, 4.0, 3.0], diverged=True).smoothed) == 3


@pytest.mark.parametrize(
    ("steepest", "recipes", "expected"),
    [
        (1.23e-3, 0.02, [4.1e-4, 1.2e-3, 3.7e-3, 0.02]),
        (1.23e-3, 1.1e-3, [4.1e-4, 1.1e-3, 3.7e-3]),  # nearly the same: the recipe's counts
        (None, 3e-4, [1e-4, 3e-4, 9e-4]),
    ],
)
def test_candidates(steepest: float | None, recipes: float, expected: list[float]):
    assert choose_candidates(steepest, recipes) == pytest.approx(expected)


def test_what_was_not_tried_beside_the_best_rate():
    assert next_candidate([0.1, 0.3, 0.9], 0.9) == pytest.approx(2.7)
    assert next_candidate([0.1, 0.3, 0.9], 0.1) == pytest.approx(0.033)
    assert next_candidate([0.1, 0.3, 0.9], 0.3) is None
    assert next_candidate([0.1, 0.3, 9], 0.3) == pytest.approx(0.9)  # 9 is too far to tell
    assert next_candidate([0.001, 0.3, 0.9], 0.3) == pytest.approx(0.1)


def test_divergence():
    assert first_divergence([5.0, 4.0, 3.0, 11.9]) is None
    assert first_divergence([5.0, 3.0, 12.1, 1.0]) == 2
    assert first_divergence([5.0, math.nan]) == 1
    assert first_divergence([math.inf]) == 0
