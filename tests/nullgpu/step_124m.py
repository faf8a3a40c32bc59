"""Count steps of GPT-2 124M on the null GPU, and its loss alone; print the counts as JSON.

python tests/nullgpu/step_124m.py    # with the library of build.py preloaded
"""

import gc
import json
import warnings
from dataclasses import asdict

import torch

from minigpt_cli.data.loader import Batch
from minigpt_cli.distributed.world import start_world
from minigpt_cli.model.cross_entropy import (
    eager_loss_and_gradient,
    fused_loss_and_gradient,
    projected_cross_entropy,
)
from minigpt_cli.recipe import parse_recipe
from minigpt_cli.train.step import train_step
from minigpt_cli.train.trainer import build_context, warm_up
from tests.nullgpu.counts import StepCounts, count_step
from tests.nullgpu.gpt2_124m import RECIPE

VOCAB_SIZE = 50304
WAYS = {
    "plain": [],
    "recomputing": ["train.activation_checkpointing=true"],
    "micro-batches": ["train.micro_batch_size=8"],
    "muon": ["optimizer.name=muon"],
    "compiled": ["precision.compile=true"],
    "deterministic": ["train.deterministic=true"],
    "deterministic, compiled": ["train.deterministic=true", "precision.compile=true"],
}


def step(settings: list[str]) -> StepCounts:
    """Count the second step of a run; its peak is that above what there was before."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    recipe = parse_recipe(RECIPE, settings)
    torch.use_deterministic_algorithms(False)
    context = build_context(recipe, VOCAB_SIZE, start_world())
    warm_up(context, 1024)
    tokens = torch.zeros((32, 1025), dtype=torch.int64, device="cuda")
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None)
    train_step(context, batch, 0, 1.0)
    found = count_step(lambda: train_step(context, batch, 1, 1.0))
    return StepCounts(**(asdict(found) | {"peak": found.peak - before}))


def loss(compiled: bool, deterministic: bool) -> StepCounts:
    """Count the loss and its gradients."""
    gc.collect()
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    before = torch.cuda.memory_allocated()
    hidden = torch.zeros(32 * 1024, 768, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.zeros(VOCAB_SIZE, 768, device="cuda", requires_grad=True)
    targets = torch.zeros(32 * 1024, dtype=torch.int64, device="cuda")
    fused = torch.compile(fused_loss_and_gradient, dynamic=False)
    kernel = fused if compiled else eager_loss_and_gradient

    def once() -> None:
        value = projected_cross_entropy(hidden, weight, targets, kernel=kernel)
        torch.autograd.grad(value, (hidden, weight))

    once()  # compiles
    once()
    found = count_step(once)
    return StepCounts(**(asdict(found) | {"peak": found.peak - before}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # sync-debug mode is a prototype
    torch.backends.cuda.enable_cudnn_sdp(False)  # the null GPU has no cuDNN
    step(["model.num_hidden_layers=1"])  # so that the workspaces of cuBLAS exist
    table = {name: step(settings) for name, settings in WAYS.items()}
    for compiled in (False, True):
        for deterministic in (False, True):
            words = [["eager", "compiled"][compiled], *["deterministic"] * deterministic]
            table[f"loss, {', '.join(words)}"] = loss(compiled, deterministic)
    print(json.dumps({name: asdict(counts) for name, counts in table.items()}))
