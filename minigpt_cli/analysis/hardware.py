"""GPUs, number formats, threads, memory and limits of this machine."""

import math
import os
import resource
import shutil
import warnings
from pathlib import Path

from minigpt_cli.analysis.finding import Finding, pip_install
from minigpt_cli.core.cgroup import cpu_limit
from minigpt_cli.core.errors import first_line
from minigpt_cli.core.memory import available_memory, format_size

_FEWEST_FILES = 512  # a dataset keeps up to 256 shards open
_LEAST_SHARED = 1 << 30  # bytes
_DRIVER = Path("/proc/driver/nvidia/version")


def hardware_findings() -> list[Finding]:
    """Look at the machine; torch can be imported."""
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        has_gpu = torch.cuda.is_available()
    gpus = torch.cuda.device_count() if has_gpu else 0
    reason = "".join(str(each.message).partition("\n")[0][:200] for each in caught[:1])
    return [
        *([_gpu(index) for index in range(gpus)] or [_no_gpu(reason)]),
        _bf16(),
        *([_nccl(gpus)] if gpus else []),
        threads_finding(torch.get_num_threads(), len(os.sched_getaffinity(0)), cpu_limit()),
        _memory(),
        *_shared_memory(gpus),
        _open_files(),
    ]


def _gpu(index: int) -> Finding:
    import torch

    from minigpt_cli.model.cost import peak_flops

    purpose = "trains"
    try:
        name = torch.cuda.get_device_name(index)
        free, whole = torch.cuda.mem_get_info(index)
    except RuntimeError as error:  # in use by another process, or broken
        return Finding(f"GPU {index}", f"can't be used: {first_line(error)}", purpose, "lacks",
                       "nvidia-smi")  # fmt: skip
    peak = peak_flops(name)
    mfu = "its peak is not known, so MFU is n/a" if peak is None else f"{peak / 1e12:g} TFLOP/s"
    return Finding(
        f"GPU {index}", f"{name}, {format_size(free)} of {format_size(whole)} free, {mfu}", purpose
    )


def _no_gpu(reason: str) -> Finding:
    import torch

    from minigpt_cli.distributed.device import device_name

    what, purpose, cpu = "GPU", "trains faster", device_name(torch.device("cpu"))
    found = f"none: training runs on the CPU, {cpu}"
    if not (_DRIVER.exists() or shutil.which("nvidia-smi")):
        return Finding(what, found, purpose)
    if torch.version.cuda is None:
        return Finding(
            what, f"{found}: an NVIDIA driver is here, but this torch is built without CUDA",
            purpose, "lacks", pip_install("--force-reinstall", "torch"),
        )  # fmt: skip
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and (not hidden.strip() or hidden.strip().startswith("-")):
        return Finding(
            what, f"{found}: CUDA_VISIBLE_DEVICES={hidden!r} hides all GPUs", purpose, "lacks",
            "unset CUDA_VISIBLE_DEVICES",
        )  # fmt: skip
    return Finding(what, f"{found}: {reason or 'CUDA finds none'}", purpose, "lacks", "nvidia-smi")


def _bf16() -> Finding:
    import torch

    from minigpt_cli.model.precision import compute_dtype
    from minigpt_cli.recipe import PrecisionSettings

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = str(compute_dtype(PrecisionSettings(), device)).removeprefix("torch.")
    if dtype == "bfloat16":
        return Finding("bf16", "yes", '[precision] dtype = "auto" is bf16')
    return Finding("bf16", "no: this device multiplies it slowly or not at all",
                   f'[precision] dtype = "auto" is {dtype}', "lacks")  # fmt: skip


def _nccl(gpus: int) -> Finding:
    from minigpt_cli.core.environment import nccl_version

    purpose = "several GPUs: --nproc, torchrun, srun"
    version = nccl_version()
    if version is None:
        found = "this torch is built without it"
        if gpus == 1:
            return Finding("NCCL", found, purpose)
        again = pip_install("--force-reinstall", "torch")
        return Finding("NCCL", found, purpose, "lacks", again)
    return Finding("NCCL", version, purpose)


def threads_finding(threads: int, cores: int, limit: float | None) -> Finding:
    """Compare torch's threads with the cores that this process may use.

    Args:
        threads: that torch uses.
        cores: that the process may run on.
        limit: how many cores' time a container gives it; None: all.
    """
    what, purpose = "threads", "speed on a CPU"
    found = f"torch uses {threads} on {cores} cores"
    if limit is not None:
        found += f", and this container gets the time of {limit:g}"
    fitting = min(cores, math.ceil(cores if limit is None else limit))
    if threads > fitting:
        return Finding(what, found, purpose, "lacks", f"export OMP_NUM_THREADS={fitting}")
    variable = os.environ.get("OMP_NUM_THREADS")
    if variable is not None and threads < fitting // 2:  # torch takes one for each two hyperthreads
        return Finding(what, f"{found}: OMP_NUM_THREADS is {variable}", purpose, "lacks",
                       "unset OMP_NUM_THREADS")  # fmt: skip
    return Finding(what, found, purpose)


def _memory() -> Finding:
    free = available_memory()
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = "not known" if free is None else f"{format_size(free)} of {format_size(whole)} free"
    return Finding("memory", found, "models on a CPU, copies for saving")


def _shared_memory(gpus: int) -> list[Finding]:
    what, purpose = "/dev/shm", "NCCL, between the ranks of a machine"
    try:
        free = shutil.disk_usage(what).free
    except OSError:
        return []
    if gpus > 1 and free < _LEAST_SHARED:
        return [Finding(what, f"{format_size(free)} free", purpose, "lacks",
                        "docker run --shm-size=8g ...")]  # fmt: skip
    return [Finding(what, f"{format_size(free)} free", purpose)]


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    what, purpose, found = "open files", "large datasets: a file for 100M tokens", f"{soft:,}"
    if soft == resource.RLIM_INFINITY:
        return Finding(what, "no limit", purpose)
    if soft < _FEWEST_FILES:
        most = 4096 if hard == resource.RLIM_INFINITY else min(hard, 4096)
        return Finding(what, f"at most {found}", purpose, "lacks", f"ulimit -n {most}")
    return Finding(what, f"at most {found}", purpose)
