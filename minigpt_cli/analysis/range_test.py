"""The arithmetic of a learning-rate range test: smoothed loss, steepest fall, candidates.

Smith (2017), "Cyclical Learning Rates for Training Neural Networks", section 3.3.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FACTOR = 3.0  # between two candidates
DIVERGED_FACTOR = 4.0  # a loss this many times the lowest one so far ends a training
_WIDTH = 0.03  # of the smoothing, as a share of all steps
_LEAST_WIDTH = 2.0  # steps
_TOLERANCE = 0.05  # of the whole fall: a loss this little above the lowest one is noise
_SAME = 1.25  # rates that differ by less than this factor are one candidate


@dataclass(frozen=True)
class RangeTest:
    """What a range test measured.

    Attributes:
        rates: the learning rate of each step, rising.
        losses: the training loss of each step's batch before its update, in nats per token.
        smoothed: the losses without most of their noise.
        steepest: the rate at which the smoothed loss falls fastest; None if it falls nowhere.
        diverged: whether the test ended early, because the loss was not finite or far above the
            lowest one.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    steepest: float | None
    diverged: bool


def rising_rates(first: float, last: float, steps: int) -> list[float]:
    """Return ``steps`` rates from ``first`` to ``last``, in equal factors."""
    return [float(rate) for rate in np.geomspace(first, last, steps)]


def read_range_test(rates: list[float], losses: list[float], diverged: bool) -> RangeTest:
    """Smooth the losses of a range test and find their steepest fall.

    Args:
        rates: all rates of the test.
        losses: of its steps, fewer than rates if it ended early.
        diverged: whether it ended early.
    """
    rates = rates[: len(losses)]
    if len(losses) < 3:  # no line through fewer points says anything
        return RangeTest(rates, losses, losses, None, diverged)
    smoothed, slopes = smooth(np.log(rates), np.array(losses), _width(len(rates)))
    # A fall counts where the loss is lower than before: after a spike it is only the way back.
    lowest = np.minimum.accumulate(smoothed)
    new_ground = smoothed <= lowest + _TOLERANCE * (smoothed[0] - lowest[-1])
    slopes = np.where(new_ground, slopes, np.inf)
    steepest = int(slopes.argmin())
    at = rates[steepest] if slopes[steepest] < 0 else None
    return RangeTest(rates, losses, smoothed.tolist(), at, diverged)


def smooth(
    x: NDArray[np.float64], y: NDArray[np.float64], width: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Take a weighted mean around each point, and the slope of a line by weighted least squares.

    Unlike a running mean over the points before, neither lags behind.

    Args:
        x: [n], equally spaced and rising.
        y: [n].
        width: of the Gaussian weights, in points.

    Returns:
        (means, slopes), [n] each.
    """
    index = np.arange(len(x))
    weights = np.exp(-0.5 * ((index[:, None] - index[None]) / width) ** 2)
    weights /= weights.sum(axis=1, keepdims=True)
    mean_x, mean_y = weights @ x, weights @ y
    covariance = weights @ (x * y) - mean_x * mean_y
    slopes = covariance / (weights @ (x * x) - mean_x**2)
    return mean_y, slopes


def choose_candidates(steepest: float | None, recipes: float) -> list[float]:
    """Return the rates to train with, rising: three around the steepest fall, and the recipe's.

    Args:
        steepest: of the range test; if None, the candidates are around the recipe's rate.
        recipes: the recipe's own rate; it takes the place of a candidate that is nearly the same.
    """
    middle = steepest or recipes
    around = [rounded(middle / FACTOR), rounded(middle), rounded(middle * FACTOR)]
    return sorted([*(rate for rate in around if not is_same(rate, recipes)), recipes])


def next_candidate(rates: list[float], best: float) -> float | None:
    """Return a rate above or below the best one if none was tried there; else None.

    Args:
        rates: all that were tried.
        best: one of them.
    """
    near = FACTOR * _SAME
    if not any(best < rate <= best * near for rate in rates):
        return rounded(best * FACTOR)
    if not any(best / near <= rate < best for rate in rates):
        return rounded(best / FACTOR)
    return None


def rounded(rate: float) -> float:
    """Return a rate with two digits, for a recipe."""
    return float(f"{rate:.1e}")


def is_same(a: float, b: float) -> bool:
    """Return whether two rates are too close to be two candidates."""
    return abs(math.log(a / b)) < math.log(_SAME)


def first_divergence(losses: list[float]) -> int | None:
    """Return the index of the first loss that is not finite or far above the lowest one before."""
    lowest = math.inf
    for index, loss in enumerate(losses):
        if not math.isfinite(loss) or loss > DIVERGED_FACTOR * lowest:
            return index
        lowest = min(lowest, loss)
    return None


def _width(steps: int) -> float:
    return max(_LEAST_WIDTH, _WIDTH * steps)
