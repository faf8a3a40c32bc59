"""What the null GPU has counted: launches, matrix products, copies, waits, memory.

In a process with the library preloaded:

    found = count_step(lambda: train_step(context, batch, 0, 1.0))

A whole command reports at its end, with ``NULLGPU_REPORT=PATH`` in its environment; ``read_report``
reads that file.
"""

import ctypes
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class Counts:
    """The calls of each kind and name since ``reset``.

    Attributes:
        calls: (kind, name) -> number of calls. Kinds are kernel (torch's own), triton (compiled),
            gemm, copy, memset, malloc, pinned, wait and api.
    """

    calls: dict[tuple[str, str], int]

    def total(self, *kinds: str) -> int:
        """Return the calls of these kinds."""
        return sum(calls for (kind, _), calls in self.calls.items() if kind in kinds)

    def names(self, kind: str) -> dict[str, int]:
        """Return the calls of one kind by name, most calls first."""
        found = Counter({name: calls for (each, name), calls in self.calls.items() if each == kind})
        return dict(found.most_common())


@dataclass(frozen=True)
class StepCounts:
    """What one step asks of the GPU.

    Attributes:
        kernels: launches of torch's own kernels.
        triton: launches of compiled kernels.
        products: matrix products by cuBLAS.
        peak: bytes, the allocator's peak within the step.
        waits: how often the host waits for the device.
    """

    kernels: int
    triton: int
    products: int
    peak: int
    waits: int


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def reset() -> None:
    """Forget all counts."""
    _library().nullgpu_reset()


def counts() -> Counts:
    """Return the counts since ``reset``."""
    with tempfile.NamedTemporaryFile() as file:
        _library().nullgpu_report(file.name.encode())
        return read_report(Path(file.name))


def read_report(path: Path) -> Counts:
    """Read a report: ``kind, name, calls, amount`` per line, separated by tabs."""
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return Counts({(kind, name): int(calls) for kind, name, calls, _ in rows})


def count_step(step: Callable[[], object]) -> StepCounts:
    """Take one step and count. A wait within it is an error of torch's sync-debug mode.

    Args:
        step: takes one training step; it was called before, so that optimizer state, caches and
            compiled kernels exist.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        found = counts()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return StepCounts(
        kernels=found.total("kernel"),
        triton=found.total("triton"),
        products=found.total("gemm"),
        peak=torch.cuda.max_memory_allocated(),
        waits=found.total("wait"),
    )
