"""A few faults of each kind; ``make faults`` tries hundreds."""

from collections.abc import Iterator

import pytest

from tests.faults.scene import CannotTry, Scene, scene
from tests.faults.trials import Trial, short


@pytest.fixture(scope="module")
def where() -> Iterator[Scene]:
    with scene() as made:
        yield made


@pytest.mark.parametrize("trial", list(short(0)), ids=lambda trial: f"{trial.kind}: {trial.name}")
def test_it_survives(trial: Trial, where: Scene):
    try:
        trial.do(where)
    except CannotTry as reason:
        pytest.skip(str(reason))
