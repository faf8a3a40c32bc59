"""The content of environment.json: software and hardware that a run's bits depend on."""

import platform
from typing import Any

import torch

import minigpt_cli


def software_environment() -> dict[str, Any]:
    """Return the versions of this process's software."""
    return {
        "minigpt": minigpt_cli.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
    }


def training_environment(
    *, device: str, device_type: str, computing_dtype: str, ranks: int, strategy: str
) -> dict[str, Any]:
    """Return the content of environment.json.

    Args:
        device: the device's model name.
        device_type: cpu or cuda.
        computing_dtype: the dtype of matrix products, such as bfloat16.
        ranks: the number of processes.
        strategy: single, ddp, zero2, fsdp or hsdp.
    """
    return software_environment() | {
        "device": device,
        "device_type": device_type,
        "threads": torch.get_num_threads(),
        "computing_dtype": computing_dtype,
        "ranks": ranks,
        "strategy": strategy,
    }


def environment_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a phrase for each difference that makes results differ in their bits."""
    keys = ("torch", "device", "threads", "computing_dtype", "ranks", "strategy")
    return [
        f"{key} changed from {str(before.get(key))[:80]} to {now[key]}"
        for key in keys
        if before.get(key) != now[key]
    ]
