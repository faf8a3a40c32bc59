"""LoRA adapters with random values: PEFT's and ours."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from minigpt_cli.model import lora
from minigpt_cli.model.gpt import GPT
from minigpt_cli.recipe import AdapterSettings

KINDS = {
    "plain": AdapterSettings(rank=4, alpha=8.0),
    "rank-stabilised": AdapterSettings(
        rank=2, alpha=3.0, use_rslora=True, target_modules=("all-linear",)
    ),
    "dora": AdapterSettings(rank=3, alpha=6.0, use_dora=True),
}


def peft_adapter(
    directory: Path, out: Path, kind: AdapterSettings, targets: Any = "all-linear"
) -> Any:
    """Make an adapter with PEFT and save it; return PEFT's model."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(directory),
        LoraConfig(
            r=kind.rank, lora_alpha=kind.alpha, target_modules=targets, task_type="CAUSAL_LM",
            use_rslora=kind.use_rslora, use_dora=kind.use_dora, lora_dropout=0.1,
        ),
    ).eval()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.save_pretrained(out)
    return model


def randomize(model: GPT, seed: int = 0) -> dict[str, Tensor]:
    """Give a model's adapters random values; return them by our parameter names."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, parameter in model.named_parameters():
        if lora.MARK in name:
            values[name] = torch.randn(parameter.shape, generator=generator) * 0.1
            if name.endswith("magnitude_vector"):
                values[name] = values[name].abs() + 1.0
            parameter.data.copy_(values[name])
    return values
