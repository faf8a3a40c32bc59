"""How much memory is free, and what to do when there is too little."""

import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from minigpt_cli.core.faq import faq

_ADVICE = (
    "in training, try in this order: a smaller train.micro_batch_size (the result stays the same), "
    "train.activation_checkpointing=selective or true, a shorter train.sequence_length, a smaller "
    "model; elsewhere: eval --batch-size, sample --num-samples, tokenize --workers"
)
# torch on a CPU (bytes) and on a GPU, NumPy.
_ASKED = re.compile(r"(?:[Tt]ried|[Uu]nable) to allocate ([\d.]+) (bytes|[KMGTPE]iB|B)")
# Errors that torch gives no type of their own: its CPU's, C++'s, CUDA's beside torch's allocator.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate", "std::bad_alloc", "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip
_FREE_ON_GPU = re.compile(r"of which ([\d.]+ [KMGT]iB) is free")


def available_memory() -> int | None:
    """Return the free bytes of main memory, within the limits of a container, Slurm job or ulimit.

    None if the system doesn't say.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if "MemAvailable" in line)
        own = Path("/proc/self/cgroup").read_text().splitlines()[-1].rpartition(":")[2]
        group = Path("/sys/fs/cgroup") / own.lstrip("/")
        for folder in (group, *group.parents):
            if (folder / "memory.max").exists():
                limit = (folder / "memory.max").read_text().strip()
                if limit != "max":
                    used = int((folder / "memory.current").read_text())
                    free = min(free, int(limit) - used)
        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            free = min(free, most - pages * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, ValueError, StopIteration, IndexError):
        return None
    return max(0, free)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or this machine had too little memory, also below torch.compile."""
    return any(_is_one(each) for each in _chain(error))


def describe_out_of_memory(error: BaseException) -> str:
    """Return a line about an error of too little memory: the size, what is free, the way out."""
    text = "; ".join(str(each) for each in _chain(error) if _is_one(each))
    asked, on_gpu = _ASKED.search(text), _FREE_ON_GPU.search(text)
    free = available_memory()
    parts = []
    if asked is not None:
        size, unit = asked.groups()
        amount = format_size(int(size)) if unit == "bytes" else f"{size} {unit}"
        parts.append(f"{amount} were asked for")
    if on_gpu is not None:
        parts.append(f"{on_gpu[1]} of the GPU are free")
    elif "CUDA" not in text and free is not None:
        parts.append(f"{format_size(free)} are free")
    return (
        f"out of memory{': ' if parts else ''}{', '.join(parts)}; {_ADVICE} {faq('out-of-memory')}"
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_one(error: BaseException) -> bool:
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(each in text for each in _OUT_OF_MEMORY)


def format_size(count: int) -> str:
    """Return a number of bytes in GB, or in MB if it is small."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
