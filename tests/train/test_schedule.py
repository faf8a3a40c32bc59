import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt_cli.recipe import ScheduleSettings
from minigpt_cli.train.schedule import lr_factor

NAMES = ["cosine", "linear", "constant", "wsd", "step"]


@pytest.mark.parametrize("name", NAMES)
def test_warmup_starts_at_zero_and_reaches_the_peak(name: str):
    schedule = ScheduleSettings(name=name, warmup_steps=10, milestones=(60, 80))
    assert lr_factor(schedule, 100, 0) == 0
    assert lr_factor(schedule, 100, 5) == 0.5
    assert lr_factor(schedule, 100, 10) == 1


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
def test_the_end_is_the_floor_and_stays_there(name: str):
    schedule = ScheduleSettings(name=name, warmup_steps=10, min_lr_ratio=0.1)
    assert lr_factor(schedule, 100, 100) == pytest.approx(0.1)
    assert lr_factor(schedule, 100, 1000) == pytest.approx(0.1)


def test_values_by_hand():
    cosine = ScheduleSettings(name="cosine", warmup_steps=20, min_lr_ratio=0.1)
    assert lr_factor(cosine, 100, 60) == pytest.approx(0.55)
    assert lr_factor(cosine, 100, 40) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    linear = ScheduleSettings(name="linear", warmup_steps=20, min_lr_ratio=0.0)
    assert lr_factor(linear, 100, 80) == pytest.approx(0.25)
    wsd = ScheduleSettings(name="wsd", warmup_steps=20, decay_ratio=0.2, min_lr_ratio=0.0)
    assert lr_factor(wsd, 100, 80) == 1.0
    assert lr_factor(wsd, 100, 90) == pytest.approx(0.5)
    step = ScheduleSettings(name="step", milestones=(50, 75), gamma=0.5, min_lr_ratio=0.3)
    factors = [lr_factor(step, 100, update) for update in (50, 51, 75, 76)]
    assert factors == [1.0, 0.5, 0.5, 0.3]  # the floor holds
    assert lr_factor(ScheduleSettings(name="constant"), 100, 99) == 1.0


@given(
    name=st.sampled_from(NAMES),
    warmup=st.integers(0, 100),
    floor=st.floats(0, 1),
    total=st.integers(100, 10_000),
)
def test_it_rises_once_and_stays_in_its_bounds(name: str, warmup: int, floor: float, total: int):
    schedule = ScheduleSettings(
        name=name, warmup_steps=warmup, min_lr_ratio=floor, milestones=(total // 2,)
    )
    updates = [*range(0, total, max(1, total // 97)), total, total + 5]
    factors = [lr_factor(schedule, total, update) for update in updates]
    after = [factor for update, factor in zip(updates, factors, strict=True) if update >= warmup]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    assert all(min(floor, 1.0) - 1e-12 <= factor <= 1.0 for factor in after)
    assert all(0 <= factor <= 1 for factor in factors)


def test_a_negative_update_is_a_bug():
    with pytest.raises(AssertionError):
        lr_factor(ScheduleSettings(), 10, -1)
