"""Training steps of every kind wait for nothing, and launch what they launched before."""

from pathlib import Path

import pytest

from tests.nullgpu.budgets import Table, expected, measure


@pytest.fixture(scope="module")
def found(library: Path) -> Table:
    """A wait for the device would have been an error."""
    return measure(library)


def test_no_step_waits_for_the_device(found: Table):
    assert {name: counts["waits"] for name, counts in found.items()} == dict.fromkeys(found, 0)


def test_launches_and_memory_are_as_before(found: Table):
    """After a change that is meant to change them: ``make nullgpu-budgets``."""
    table = expected()
    assert found.keys() == table.keys()
    changed = {
        f"{name}: {what}": f"{counts[what]:,}, not {table[name][what]:,}"
        for name, counts in found.items()
        for what in counts
        if counts[what] != table[name][what]
    }
    assert not changed


def test_fewer_launches_when_compiled(found: Table):
    for name, counts in found.items():
        if name.endswith(", compiled"):
            eager = found[name.removesuffix(", compiled")]
            launches = counts["kernels"] + counts["triton"]
            assert launches < eager["kernels"] + eager["triton"], name
            assert counts["triton"], name
