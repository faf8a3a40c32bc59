"""Train two blocks on packed rows; print what a step launched, as JSON.

packed.py FAMILY [SETTING...]
"""

import ctypes
import json
import sys
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
family = "{family}"
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

family, *settings = sys.argv[1:]
if family != "gpt2":
    settings.append("model.num_key_value_heads=4")
lib = ctypes.CDLL("libcuda.so.1")
torch.backends.cuda.enable_cudnn_sdp(False)  # the null GPU has no cuDNN
recipe = parse_recipe(RECIPE.format(family=family), settings)
context = build_context(recipe, 1024, start_world())
warm_up(context, recipe.train.sequence_length, packed=True)
tokens = torch.zeros((8, 1025), dtype=torch.int64, device="cuda")
batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.zeros_like(tokens[:, 1:]), [3] * 8)
train_step(context, batch, 0, 1.0)
batch = batch._replace(segment_counts=[*range(2, 10)])
torch.cuda.synchronize()
torch.cuda.reset_peak_memory_stats()
before = torch.cuda.memory_allocated()
lib.nullgpu_reset()
torch.cuda.set_sync_debug_mode("error")
train_step(context, batch, 1, 1.0)
with tempfile.NamedTemporaryFile() as file:
    lib.nullgpu_report(file.name.encode())
    calls = [line.split("\t") for line in Path(file.name).read_text().splitlines()]


def count(*names: str) -> int:
    return sum(int(number) for _, name, number, _ in calls if any(each in name for each in names))


found = {
    "compilations": counters["stats"]["unique_graphs"],
    "flash_forward": count("flash_fwd"),
    "flash_backward": count("flash_bwd_dq_dk_dv"),
    "with_mask": count("fmha_cutlass"),
    "waits": sum(int(number) for kind, _, number, _ in calls if kind == "wait"),
    "products": sum(int(number) for kind, _, number, _ in calls if kind == "gemm"),
    "bytes": torch.cuda.max_memory_allocated() - before,
}
print(json.dumps(found))
