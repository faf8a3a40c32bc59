"""Take small steps of every kind on the null GPU; print what each asks of the GPU, as JSON.

    python -m tests.nullgpu.budgets   # runs this file

A wait within a step is an error.
"""

import gc
import itertools
import json
import sys
import warnings
from dataclasses import asdict, replace

import torch

from minigpt_cli.data.loader import Batch
from minigpt_cli.distributed.world import start_world
from minigpt_cli.recipe import Recipe, parse_recipe
from minigpt_cli.recipe.schema import LoraSettings
from minigpt_cli.train.step import train_step
from minigpt_cli.train.trainer import build_context, warm_up
from tests.nullgpu.counts import StepCounts, count_step

RECIPE = """
[data]
path = "unused"
[model]
hidden_size = 128
num_hidden_layers = 2
num_attention_heads = 4
[train]
steps = 10
global_batch_size = 8
micro_batch_size = 4
sequence_length = 64
deterministic = false
[optimizer]
lr = 3e-4
"""
VOCAB_SIZE = 384
GROUPED = ["model.num_key_value_heads=2"]
FAMILIES = {
    "gpt2": ["model.family=gpt2"],
    "llama": ["model.family=llama", *GROUPED],
    "qwen3": ["model.family=qwen3", *GROUPED],
}
# What needs more than a setting of the recipe.
LORA, PACKED = "lora", "packed"
Case = tuple[list[str], frozenset[str]]  # settings, and LORA or PACKED


def eager_cases() -> dict[str, Case]:
    """Return every family, optimizer and dtype; and gpt2 and llama in other ways."""
    names = itertools.product(FAMILIES, ("adamw", "muon"), ("bf16", "fp16", "fp32"))
    cases = {" ".join(name): _case(*name) for name in names}
    for family, ways in {
        "gpt2": {
            "deterministic": ["train.deterministic=true"],
            "dropout": ["model.dropout=0.1"],
            "recomputing": ["train.activation_checkpointing=true"],
            "one micro-batch": ["train.micro_batch_size=8"],
            "watching spikes": ["guard.spike_sigma=6"],
            "no clipping": ["optimizer.clip_norm=0"],
        },
        "llama": {LORA: [], PACKED: []},
    }.items():
        for way, settings in ways.items():
            cases[f"{family} adamw bf16, {way}"] = _case(family, "adamw", "bf16", settings, way)
    return cases


def compiled_cases() -> dict[str, Case]:
    """Return some of them compiled: compiling a block costs seconds, an optimizer nothing."""
    found = {}
    for family, dtype in (
        ("gpt2", "bf16"), ("llama", "bf16"), ("qwen3", "bf16"), ("gpt2", "fp16"), ("qwen3", "fp32"),
    ):  # fmt: skip
        for optimizer in ("adamw", "muon"):
            found[f"{family} {optimizer} {dtype}, compiled"] = _case(family, optimizer, dtype)
    for family, way, settings in (
        ("gpt2", "dropout", ["model.dropout=0.1"]), ("llama", LORA, []), ("llama", PACKED, []),
    ):  # fmt: skip
        case = _case(family, "adamw", "bf16", settings, way)
        found[f"{family} adamw bf16, {way}, compiled"] = case
    return {name: ([*case, "precision.compile=true"], ways) for name, (case, ways) in found.items()}


def _case(
    family: str, optimizer: str, dtype: str, settings: list[str] | None = None, way: str = ""
) -> Case:
    named = [f"optimizer.name={optimizer}", f"precision.dtype={dtype}", "precision.compile=false"]
    return [*FAMILIES[family], *named, *(settings or [])], frozenset({way} & {LORA, PACKED})


def count(case: Case) -> StepCounts:
    """Build a model and count its third step; the peak is that above what there was before."""
    settings, ways = case
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    gc.collect()
    before = torch.cuda.memory_allocated()
    recipe = parse_recipe(RECIPE, settings)
    if LORA in ways:
        recipe = replace(recipe, lora=LoraSettings(base="unused", rank=4))
    found = _count_step(recipe, PACKED in ways)
    return replace(found, peak=found.peak - before)


def _count_step(recipe: Recipe, packed: bool) -> StepCounts:
    context = build_context(recipe, VOCAB_SIZE, start_world())
    length = recipe.train.sequence_length
    warm_up(context, length, packed)
    if recipe.precision.compile:
        assert "forward" in vars(context.model.layers[0]), "not compiled"
    tokens = torch.zeros(
        (recipe.train.global_batch_size, length + 1), dtype=torch.int64, device="cuda"
    )
    segments = (tokens[:, 1:], [3] * len(tokens)) if packed else (None, None)
    batch = Batch(tokens[:, :-1], tokens[:, 1:], *segments)
    for step in range(2):
        train_step(context, batch, step, 1.0)
    return count_step(lambda: train_step(context, batch, 2, 1.0))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # sync-debug mode is a prototype
    torch.backends.cuda.enable_cudnn_sdp(False)  # the null GPU has no cuDNN
    cases = {"eager": eager_cases, "compiled": compiled_cases}[sys.argv[1]]()
    count(next(iter(cases.values())))  # so that the workspaces of cuBLAS exist
    print(json.dumps({name: asdict(count(case)) for name, case in cases.items()}))
