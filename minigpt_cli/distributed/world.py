"""Which device this process computes on, and its place among the others.

One process so far: started by torchrun or srun as several, it refuses rather than train several
copies of the same model.
"""

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

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0


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
    return World(rank=0, size=1, device=device)


def device_name(device: torch.device) -> str:
    """The device's model name, as its driver gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return "CPU"


def use_deterministic_kernels(device: torch.device, compiled: bool) -> None:
    """Ask torch for the same bits every time, where the default kernels don't give them.

    On a CPU eager kernels do at a fixed number of threads; compiled ones and CUDA's need to be told.
    """
    if device.type == "cpu" and not compiled:
        return
    # cuBLAS reads it when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # Filling fresh memory would find reads of it, at the price of a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False
