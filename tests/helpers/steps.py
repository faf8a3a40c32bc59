"""A tiny model with optimizers and a step, and batches for it."""

import torch
from torch import Tensor

from minigpt_cli.data.loader import Batch
from minigpt_cli.distributed.world import World
from minigpt_cli.model.gpt import initialize_weights
from minigpt_cli.recipe.schema import (
    ModelSettings,
    OptimizerSettings,
    PrecisionSettings,
    Recipe,
    TrainSettings,
)
from minigpt_cli.train.step import StepContext
from minigpt_cli.train.trainer import build_context

CPU = torch.device("cpu")
VOCAB = 67
_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


def tiny_context(
    dtype: torch.dtype = torch.float64,
    *,
    name: str = "adamw",
    clip: float = 1.0,
    micro: int = 8,
    dropout: float = 0.0,
) -> StepContext:
    recipe = Recipe(
        model=ModelSettings(
            family="llama", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            dropout=dropout,
        ),
        train=TrainSettings(
            global_batch_size=8, sequence_length=16, micro_batch_size=micro, seed=5
        ),
        optimizer=OptimizerSettings(lr=1e-2, name=name, clip_norm=clip),
        precision=PrecisionSettings(dtype=_NAMES[dtype]),
    )  # fmt: skip
    context = build_context(recipe, VOCAB, World(rank=0, size=1, device=CPU))
    initialize_weights(context.model, 3)
    return context


def batch(seed: int = 0) -> Batch:
    tokens = torch.randint(VOCAB, (8, 17), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1], tokens[:, 1:], None)


def everything(t: StepContext) -> list[Tensor]:
    """Weights, moments and step counts."""
    found = [p.detach() for p in t.model.parameters()]
    for each in t.optimizers:
        for p in each.state:
            found += [value for value in each.state[p].values() if isinstance(value, Tensor)]
    return [value.clone() for value in found]
