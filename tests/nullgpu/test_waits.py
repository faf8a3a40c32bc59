"""How often evaluation and sampling wait for the GPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.nullgpu.process import script_output


@pytest.fixture(scope="module")
def waits(library: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(script_output(library, "waits.py"))
    assert list(found) == ["gpt2", "llama", "qwen3"]
    return found


def test_an_evaluation_waits_once(waits: dict[str, Any]):
    assert [found["evaluations"] for found in waits.values()] == [[1, 1]] * 3


def test_sampling_waits_once_for_each_token(waits: dict[str, Any]):
    for family, found in waits.items():
        for few, many in found["samplings"]:  # of 4 and of 12 tokens
            assert many - few == 12 - 4, family
