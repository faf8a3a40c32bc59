"""Decode on a GPU; print the attention kernels of each family, as JSON."""

import json
from collections.abc import Callable
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from minigpt_cli.generate.engine import generate
from minigpt_cli.generate.sampling import SamplingOptions
from minigpt_cli.model.config import model_config
from minigpt_cli.model.gpt import GPT

DEVICE = torch.device("cuda")


def kernels(work: Callable[[], object]) -> list[str]:
    """Return the names of the attention kernels that are called."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    names = {event.key.removeprefix("aten::") for event in profiler.key_averages()}
    return sorted(name for name in names if name.startswith("_scaled_dot_product"))


def attend() -> None:
    part = torch.zeros(1, 4, 9, 64, dtype=torch.bfloat16, device=DEVICE)
    with suppress(RuntimeError):  # cuDNN doesn't start on this GPU
        F.scaled_dot_product_attention(part[:, :, :1], part, part)


found: dict[str, list[str]] = {"by itself": kernels(attend)}
for family in ("gpt2", "llama", "qwen3"):
    config = model_config(
        family=family, vocab_size=128, hidden_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=None if family == "gpt2" else 2, max_position_embeddings=64,
    )  # fmt: skip
    for dtype in (torch.float32, torch.bfloat16):
        model = GPT(config).to(DEVICE, dtype)
        greedy = SamplingOptions(temperature=0.0)
        steps = generate(model, [1, 2, 3], greedy, max_new_tokens=5, num_samples=2)
        found[f"{family} {str(dtype)[6:]}"] = kernels(lambda steps=steps: list(steps))
print(json.dumps(found))
