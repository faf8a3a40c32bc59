"""Train two blocks on packed rows, in several ways; print what a step launched, as JSON."""

import ctypes
import gc
import json
import tempfile
from pathlib import Path

import torch
from torch._dynamo.utils import counters

from minigpt_cli.data.loader import Batch
from minigpt_cli.distributed.world import start_world
from minigpt_cli.recipe import parse_recipe
from minigpt_cli.train.step import train_step
from minigpt_cli.train.trainer import build_context, warm_up

RECIPE = """
[data]
path = "unused"
[model]
family = "gpt2"
hidden_size = 768
num_hidden_layers = 2
num_attention_heads = 12
[train]
steps = 2
global_batch_size = 8
micro_batch_size = 4
sequence_length = 1024
[optimizer]
lr = 3e-4
[precision]
dtype = "bf16"
compile = false
"""
LLAMA = ["model.family=llama", "model.num_key_value_heads=4"]
SELECTIVE = "train.activation_checkpointing=selective"
WAYS = {
    "gpt2": [],
    "gpt2, selective": [SELECTIVE],
    "gpt2, recomputing": ["train.activation_checkpointing=true"],
    "llama": LLAMA,
    "llama, selective": [*LLAMA, SELECTIVE],
    "llama, selective, compiled": [*LLAMA, SELECTIVE, "precision.compile=true"],
    "fp32": ["precision.dtype=fp32"],
    "dropout": ["model.dropout=0.1"],
}
lib = ctypes.CDLL("libcuda.so.1")


def launches() -> list[tuple[str, str, int]]:
    """Return (kind, name, calls) since the last reset."""
    with tempfile.NamedTemporaryFile() as file:
        lib.nullgpu_report(file.name.encode())
        lines = [line.split("\t") for line in Path(file.name).read_text().splitlines()]
    return [(kind, name, int(calls)) for kind, name, calls, _ in lines]


def measure(settings: list[str]) -> dict[str, int]:
    """Count what the second step launches, whose rows have other numbers of segments."""
    gc.collect()
    counters.clear()
    recipe = parse_recipe(RECIPE, settings)
    context = build_context(recipe, 1024, start_world())
    warm_up(context, recipe.train.sequence_length, packed=True)
    tokens = torch.zeros((8, 1025), dtype=torch.int64, device="cuda")
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(tokens[:, 1:]), [3] * 8)
    train_step(context, batch, 0, 1.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    lib.nullgpu_reset()
    torch.cuda.set_sync_debug_mode("error")
    train_step(context, batch._replace(segment_counts=[*range(2, 10)]), 1, 1.0)
    torch.cuda.set_sync_debug_mode("default")
    found = launches()

    def count(part: str) -> int:
        return sum(calls for _, name, calls in found if part in name)

    return {
        "compilations": counters["stats"]["unique_graphs"],
        "flash_forward": count("flash_fwd"),
        "flash_backward": count("flash_bwd_dq_dk_dv"),
        "with_mask": count("fmha_cutlass"),
        "waits": sum(calls for kind, _, calls in found if kind == "wait"),
        "products": sum(calls for kind, _, calls in found if kind == "gemm"),
        "bytes": torch.cuda.max_memory_allocated() - before,
    }


torch.backends.cuda.enable_cudnn_sdp(False)  # the null GPU has no cuDNN
print(json.dumps({name: measure(settings) for name, settings in WAYS.items()}))
