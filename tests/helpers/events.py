"""Call functions in the middle of a training step."""

import os
import signal
from collections.abc import Callable
from itertools import count

import torch

from minigpt_cli.train.run import Run


def in_micro_batches(run: Run, events: dict[int, Callable[[], None]]) -> None:
    """Call each event in the backward pass of the micro-batch with its number, from 0."""
    numbers = count()

    def hook(grad: torch.Tensor) -> None:
        events.get(next(numbers), lambda: None)()

    run.context.model.norm.weight.register_hook(hook)


def stop() -> None:
    """Send this process SIGTERM."""
    os.kill(os.getpid(), signal.SIGTERM)
