"""Train GPT-2 124M in several ways; print predicted and allocated peak bytes, as JSON."""

import gc
import json

import torch

from minigpt_cli.data.loader import Batch
from minigpt_cli.distributed.world import start_world
from minigpt_cli.model.config import config_from_recipe
from minigpt_cli.model.device_memory import device_memory_needed
from minigpt_cli.model.workload import workload_of
from minigpt_cli.recipe import parse_recipe
from minigpt_cli.train.step import train_step
from minigpt_cli.train.trainer import build_context, warm_up
from tests.nullgpu.gpt2_124m import RECIPE

VOCAB_SIZE = 50257
WAYS = {
    "plain": [],
    "recomputing": ["train.activation_checkpointing=true"],
    "selective": ["train.activation_checkpointing=selective"],
    "micro-batches": ["train.micro_batch_size=8"],
    "deterministic": ["train.deterministic=true"],
    "llama": [
        "model.family=llama",
        "model.num_key_value_heads=4",
        "train.micro_batch_size=8",
        "optimizer.name=muon",
    ],
    "selective llama": [
        "model.family=llama",
        "model.num_key_value_heads=4",
        "train.activation_checkpointing=selective",
    ],
}


def allocated(settings: list[str]) -> int:
    """Return the allocator's peak over two steps."""
    recipe = parse_recipe(RECIPE, settings)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    context = build_context(recipe, VOCAB_SIZE, start_world())
    warm_up(context, recipe.train.sequence_length)
    tokens = torch.zeros((32, 1025), dtype=torch.int64, device="cuda")
    for step in range(2):
        train_step(context, Batch(tokens[:, :-1], tokens[:, 1:], None), step, 1.0)
    return torch.cuda.max_memory_allocated()


torch.backends.cuda.enable_cudnn_sdp(False)  # the null GPU has no cuDNN
found = {}
for name, settings in WAYS.items():
    recipe = parse_recipe(RECIPE, settings)
    workload = workload_of(recipe, 1, "cuda", "single")
    predicted = device_memory_needed(config_from_recipe(recipe, VOCAB_SIZE), workload)
    found[name] = {"predicted": predicted.peak, "allocated": allocated(settings)}
print(json.dumps(found))
