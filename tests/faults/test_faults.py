"""One fault of each kind, with ``-m slow`` a few more; ``make faults`` tries hundreds."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.scene import CannotTry, Scene, scene
from tests.faults.trials import Trial, short


@pytest.fixture(scope="module")
def where() -> Iterator[Scene]:
    with scene() as made:
        yield made


def trials() -> Iterator[Any]:
    kinds = set()
    for trial in short(0):
        marks = [pytest.mark.slow] if trial.kind in kinds else []
        yield pytest.param(trial, id=f"{trial.kind}: {trial.name}", marks=marks)
        kinds.add(trial.kind)


@pytest.mark.parametrize("trial", list(trials()))
def test_it_survives(trial: Trial, where: Scene):
    try:
        trial.do(where)
    except CannotTry as reason:
        pytest.skip(str(reason))
