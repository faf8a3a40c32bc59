"""Whether a model's blocks are compiled, and how to run them without their compilations."""

from contextlib import AbstractContextManager, nullcontext

import torch

from minigpt_cli.model.gpt import GPT


def is_compiled(model: GPT) -> bool:
    """Return whether the ``forward`` of the blocks was replaced by a compiled one."""
    return "forward" in vars(model.layers[0])


def run_eagerly(model: GPT) -> AbstractContextManager[object]:
    """Return a context for passes of other shapes and modes than those of training.

    Compiled blocks would be compiled again for each of them.
    """
    # Only where the compiler is used: this imports it, which takes a second.
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()
