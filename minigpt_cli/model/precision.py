"""The dtype of matrix products, and loss scaling for fp16."""

import contextlib
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from minigpt_cli.core.errors import UserError
from minigpt_cli.recipe import PrecisionSettings

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp64": torch.float64,
}


def compute_dtype(precision: PrecisionSettings, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products for ``[precision] dtype`` on this device.

    ``auto`` is bf16 where the device multiplies it natively (a GPU since Ampere, a CPU with
    AVX512-BF16 or AMX), fp16 on older GPUs and fp32 on other CPUs.

    Raises:
        UserError: the device doesn't support the dtype.
    """
    on_gpu = device.type == "cuda"
    gpu_has_bf16 = on_gpu and torch.cuda.get_device_capability(device) >= (8, 0)
    if precision.dtype != "auto":
        if precision.dtype == "bf16" and on_gpu and not gpu_has_bf16:
            raise UserError(
                f"[precision] dtype bf16: {torch.cuda.get_device_name(device)} has no bf16; "
                "set precision.dtype=fp16"
            )
        return DTYPES[precision.dtype]
    if on_gpu:
        return torch.bfloat16 if gpu_has_bf16 else torch.float16
    return torch.bfloat16 if cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Return whether this CPU multiplies bf16 natively."""
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def compiles(precision: PrecisionSettings, device: torch.device) -> bool:
    """Return whether ``[precision] compile`` asks for a compiled model on this device."""
    return device.type == "cuda" if precision.compile == "auto" else precision.compile


def weights_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of weights and optimizer state: float32, or float64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with x: autocast's if it is on, else x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """Return a context: matrix products in ``dtype``, sums and norms in float32."""
    if dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, dtype)
    return contextlib.nullcontext()


def grad_scaler(dtype: torch.dtype, device: torch.device) -> torch.amp.GradScaler:
    """Make the loss scaler for fp16 (Micikevicius et al. 2018); for other dtypes it is disabled."""
    return torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
