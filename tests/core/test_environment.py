from pathlib import Path
from typing import Any

import pytest

from minigpt_cli.core import environment
from minigpt_cli.core.environment import environment_changes, training_environment


def test_changes_of_the_environment():
    now = training_environment(
        device="A", device_type="cpu", computing_dtype="float32", ranks=2, strategy="ddp"
    )
    assert environment_changes(now, now) == []
    assert environment_changes(now | {"platform": "another"}, now) == []
    before = now | {"ranks": 4, "device": "B"}
    assert environment_changes(before, now) == [
        "device changed from B to A",
        "ranks changed from 4 to 2",
    ]


def test_what_gpus_bits_depend_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    driver = tmp_path / "version"
    monkeypatch.setattr(environment, "_DRIVER", driver)

    def on_gpu() -> dict[str, Any]:
        return training_environment(
            device="A", device_type="cuda", computing_dtype="bfloat16", ranks=8, strategy="fsdp"
        )

    older = {key: value for key, value in on_gpu().items() if not key.startswith(("dr", "nccl"))}
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    before = on_gpu()
    assert before["driver"] == "535.104.05"
    assert before["nccl_variables"]["NCCL_ALGO"] == "Ring"
    driver.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build\n"
        "GCC version:  gcc version 12.3.0\n"
    )
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert environment_changes(before, on_gpu()) == [
        "driver changed from 535.104.05 to 550.54.14",
        "NCCL_ALGO changed from Ring to Tree",
    ]
    assert environment_changes(older, on_gpu()) == []
