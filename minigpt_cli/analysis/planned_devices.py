"""The devices that a run is planned for: this machine's, or GPUs that may be elsewhere."""

from dataclasses import dataclass
from typing import Literal

import torch

from minigpt_cli.core.memory import available_memory
from minigpt_cli.distributed.device import device_name
from minigpt_cli.model import precision
from minigpt_cli.model.cost import peak_flops
from minigpt_cli.recipe import Recipe

USABLE = 0.9  # of a GPU: the rest is for the CUDA context, NCCL's buffers and fragments


@dataclass(frozen=True)
class PlannedDevices:
    """The devices that a run is planned for.

    Attributes:
        type: "cuda" or "cpu".
        count: number of devices, one rank each.
        name: None if it isn't known.
        memory: bytes of one device; of a CPU those that are free. None if not known.
        peak_flops: of one device, per second; None if not known.
        dtype: of matrix products.
    """

    type: Literal["cuda", "cpu"]
    count: int
    name: str | None
    memory: int | None
    peak_flops: float | None
    dtype: str

    @property
    def compute_bytes(self) -> int:
        return {"fp32": 4, "fp64": 8}.get(self.dtype, 2)


def local_devices(recipe: Recipe) -> PlannedDevices:
    """Return this machine's device: one GPU, else the CPU."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dtype = precision.compute_dtype(recipe.precision, device)
    name = device_name(device)
    memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else available_memory()
    short = next(key for key, value in precision.DTYPES.items() if value == dtype)
    kind: Literal["cuda", "cpu"] = "cuda" if on_gpu else "cpu"
    return PlannedDevices(kind, 1, name, memory, peak_flops(name), short)


def gpu_devices(recipe: Recipe, count: int, memory: int | None, name: str | None) -> PlannedDevices:
    """Return GPUs that may be elsewhere.

    Args:
        recipe: its dtype; ``auto`` is bf16.
        count: number of GPUs.
        memory: bytes of one; default: of this machine's GPU, if it has one.
        name: for the peak; default: of this machine's GPU, if it has one.
    """
    if torch.cuda.is_available():
        name = name or torch.cuda.get_device_name(0)
        memory = memory or torch.cuda.get_device_properties(0).total_memory
    dtype = "bf16" if recipe.precision.dtype == "auto" else recipe.precision.dtype
    return PlannedDevices("cuda", count, name, memory, peak_flops(name or ""), dtype)


def usable_memory(devices: PlannedDevices) -> int | None:
    """Return the bytes of a device that a step may use."""
    if devices.memory is None or devices.type == "cpu":
        return devices.memory
    return round(USABLE * devices.memory)
