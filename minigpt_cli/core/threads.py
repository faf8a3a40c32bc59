"""Threads that work with tensors."""

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def device_thread(name: str, device: "torch.device") -> ThreadPoolExecutor:
    """Return a pool of one thread whose current device is ``device``.

    By itself a new thread's current device is the first GPU, also on a rank that uses another one.
    What waits for "the current stream" would then wait for the wrong one.
    """

    def use_device() -> None:
        if device.type == "cuda":
            import torch

            torch.cuda.set_device(device)

    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=use_device)
