"""Which device this process computes on, and its place among the others.

One process so far: started by torchrun or srun as several, it refuses rather than train several
copies of the same model.
"""

import ctypes
import os
from dataclasses import dataclass

import torch

from minigpt_cli.errors import UserError


@dataclass(frozen=True)
class World:
    """This process: its rank, how many ranks there are, and the device it computes on."""

    rank: int
    size: int
    device: torch.device


def start() -> World:
    """Find the device: the first CUDA GPU, else the CPU.

    Raises:
        UserError: a launcher started several processes.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        raise UserError(
            f"started as one of {size} processes, but this version trains on one device: "
            "run minigpt without a launcher"
        )
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        _keep_freed_memory()
    return World(rank=0, size=1, device=device)


def _keep_freed_memory() -> None:
    """Have the C library keep the memory of freed tensors for the next ones.

    By default glibc returns every larger block to the system at once and asks for it again, page
    fault by page fault: this alone makes a training step on a CPU 1.2 to 1.6 times as fast
    (benchmarks/LOG.md). Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    mmap_max, trim_threshold, top_pad = -4, -1, -2  # of <malloc.h>
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 * 2**20)


def device_name(device: torch.device) -> str:
    """The device's model name, as its driver gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return "CPU"


def use_deterministic_kernels(device: torch.device, compiled: bool) -> None:
    """Ask torch for the same bits every time, where the default kernels don't give them.

    On a CPU eager kernels do at a fixed number of threads; compiled ones and CUDA's must be told.
    """
    if device.type == "cpu" and not compiled:
        return
    # cuBLAS reads it when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory would find reads of it, at the price of a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
