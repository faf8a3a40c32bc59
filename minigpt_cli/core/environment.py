"""The content of environment.json: software and hardware that a run's bits depend on."""

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

import minigpt_cli

_DRIVER = Path("/proc/driver/nvidia/version")


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
    on_gpu = device_type == "cuda"
    return software_environment() | {
        "device": device,
        "device_type": device_type,
        "threads": torch.get_num_threads(),
        "computing_dtype": computing_dtype,
        "ranks": ranks,
        "strategy": strategy,
        "driver": _driver_version() if on_gpu else None,
        "nccl": nccl_version() if on_gpu else None,
        "nccl_variables": _nccl_variables() if on_gpu else {},
    }


def nccl_version() -> str | None:
    """Return the version of NCCL; None if this torch is built without it."""
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except (AttributeError, RuntimeError):
        return None


def _driver_version() -> str | None:
    """Return the version of NVIDIA's kernel module; None if the system doesn't say."""
    try:
        found = re.search(r"Kernel Module.*?\s(\d[\d.]+)\s", _DRIVER.read_text())
    except (OSError, ValueError):
        return None
    return None if found is None else found[1]


def _nccl_variables() -> dict[str, str]:
    return {name: os.environ[name] for name in sorted(os.environ) if name.startswith("NCCL_")}


def environment_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a phrase for each difference that makes results differ in their bits."""
    keys = ("torch", "device", "threads", "computing_dtype", "ranks", "strategy")
    changes = [
        f"{key} changed from {str(before.get(key))[:80]} to {now[key]}"
        for key in keys
        if before.get(key) != now[key]
    ]
    # Older runs didn't note these.
    changes += [
        f"{key} changed from {str(before[key])[:80]} to {now[key]}"
        for key in ("driver", "nccl")
        if key in before and before[key] != now[key]
    ]
    old, new = before.get("nccl_variables"), now["nccl_variables"]
    if isinstance(old, dict):
        changes += [
            f"{name} changed from {str(old.get(name))[:80]} to {str(new.get(name))[:80]}"
            for name in sorted({*old, *new})
            if old.get(name) != new.get(name) and not name.startswith("NCCL_DEBUG")
        ]
    return changes
