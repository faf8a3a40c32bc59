"""A tiny model with optimizers and a step, and batches for it."""

import torch
from torch import Tensor

from minigpt_cli.data.loader import Batch
from minigpt_cli.distributed.parallel import ParallelDims
from minigpt_cli.distributed.world import World
from minigpt_cli.model import precision
from minigpt_cli.model.config import model_config
from minigpt_cli.model.gpt import GPT, initialize_weights
from minigpt_cli.recipe import OptimizerSettings
from minigpt_cli.train import guard, optimizer
from minigpt_cli.train.step import StepContext

CPU = torch.device("cpu")


VOCAB = 67


def tiny_context(
    dtype: torch.dtype = torch.float64,
    *,
    name: str = "adamw",
    clip: float = 1.0,
    micro: int = 8,
    dropout: float = 0.0,
    device: torch.device = CPU,
) -> StepContext:
    config = model_config(
        family="llama", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=16, dropout=dropout,
    )  # fmt: skip
    model = GPT(config).to(device, precision.weights_dtype(dtype))
    initialize_weights(model, 3)
    return StepContext(
        model=model,
        forward=model,
        parallel_dims=ParallelDims("single", World(rank=0, size=1, device=device)),
        optimizers=optimizer.build(model, OptimizerSettings(lr=1e-2, name=name, clip_norm=clip)),
        scaler=precision.grad_scaler(dtype, device),
        guard=guard.new_guard(device),
        dtype=dtype,
        seed=5,
        micro_batch_size=micro,
        clip_norm=clip,
        dropout=bool(model.config.dropout),
    )


def batch(seed: int = 0, device: torch.device = CPU) -> Batch:
    tokens = torch.randint(VOCAB, (8, 17), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1].to(device), tokens[:, 1:].to(device), None)


def everything(t: StepContext) -> list[Tensor]:
    """Weights, moments and step counts."""
    found = [p.detach() for p in t.model.parameters()]
    for each in t.optimizers:
        for p in each.state:
            found += [value for value in each.state[p].values() if isinstance(value, Tensor)]
    return [value.clone() for value in found]
