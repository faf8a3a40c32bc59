"""The device of this process, its memory and threads, and deterministic kernels."""

import ctypes
import os
import resource

import torch

from minigpt_cli.core.console import warn
from minigpt_cli.core.env_variables import env_int
from minigpt_cli.core.memory import available_memory


def find_device(local_rank: int = 0, local_size: int = 1) -> torch.device:
    """Choose the rank's CUDA GPU, else the CPU, whose cores the ranks of a machine share."""
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device
    if local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = env_int("SLURM_CPUS_PER_TASK", 0)
        torch.set_num_threads(cores or max(1, len(os.sched_getaffinity(0)) // local_size))
    _keep_freed_memory()
    return torch.device("cpu")


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has used so far: of tensors on a GPU, else of all."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_memory(device: torch.device, local_size: int) -> int:
    """Return the bytes of memory that this rank may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local_size


def free_memory(device: torch.device, local_size: int) -> int | None:
    """Return the free bytes of memory that this rank may use; None if the system doesn't say."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free if total else None
    free_of_all = available_memory()
    return None if free_of_all is None else free_of_all // local_size


def _keep_freed_memory() -> None:
    """Make the C library keep the memory of freed tensors for the next ones.

    By default glibc returns each large block to the system and asks for it again, with page
    faults. Keeping it makes a training step on a CPU 1.2 to 1.6 times as fast
    (benchmarks/LOG.md). Other C libraries are not changed.
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
    """Return the device's model name, as its driver gives it."""
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
    """Make torch use deterministic kernels, where the default ones are not.

    Eager kernels on a CPU are, for a fixed number of threads. Compiled ones and CUDA's are not.
    """
    if device.type == "cpu" and not compiled:
        return
    # cuBLAS reads this when its first handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    if compiled:
        from torch._inductor import config

        config.deterministic = True  # else it chooses between kernels by their time
    # It would fill every new tensor, which costs a pass over each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def use_tf32(device: torch.device, wanted: bool) -> None:
    """Have a GPU round what it multiplies in float32 to TF32, or not; warn where there is none."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if wanted else "highest")
    elif wanted:
        warn("precision.tf32 is ignored: it is for GPUs, and this run is on a CPU")
