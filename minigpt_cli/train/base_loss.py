"""A base model's own loss, computed plainly, to compare the model that is trained with it."""

import itertools
import math
from dataclasses import replace

import torch
from torch import nn

from minigpt_cli.core.constants import IGNORE_INDEX
from minigpt_cli.core.memory import available_memory, is_out_of_memory
from minigpt_cli.data.loader import Gathered
from minigpt_cli.distributed.device import free_memory
from minigpt_cli.huggingface.base_model import BaseModel
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.cost import count_elements, parameter_shapes
from minigpt_cli.model.gpt import GPT, meta_model


def base_loss(base: BaseModel, batch: Gathered, device: torch.device) -> float | None:
    """Compute the loss of a base model: in float32, without adapters, not sharded.

    Only one block is in memory at a time. It takes the weights of one layer after another.

    Args:
        base: the weights are read anew.
        batch: all sequences, each array int64 (n, T).
        device: where to compute.

    Returns:
        The mean loss in nats per token; None if the device has too little memory for it, or if it
        is not finite.
    """
    room = free_memory(device, 1) if device.type == "cuda" else available_memory()
    if room is not None and room < _bytes_needed(base.config, batch):
        return None
    try:
        loss = _compute(base, batch, device)
        return loss if math.isfinite(loss) else None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        if device.type == "cuda":  # what training needs must not be in many small pieces
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


@torch.no_grad()
def _compute(base: BaseModel, batch: Gathered, device: torch.device) -> float:
    model = meta_model(replace(base.config, num_hidden_layers=1)).to_empty(device=device).eval()
    block = model.layers[0]
    for name, parameter in model.named_parameters():
        if not name.startswith("layers."):
            parameter.copy_(base.read(name))
    _take_layers_in_turn(model, block, base)
    inputs, targets, *segment_ids = (
        torch.from_numpy(each).to(device) for each in batch if each is not None
    )
    total = model(inputs, targets, *segment_ids)
    return float(total) / int((targets != IGNORE_INDEX).sum())


def _take_layers_in_turn(model: GPT, block: nn.Module, base: BaseModel) -> None:
    """Make one block stand for all layers: before each call it takes the next one's weights."""
    layers = itertools.count()

    def load_next(*_: object) -> None:
        layer = next(layers)
        for name, parameter in block.named_parameters():
            parameter.copy_(base.read(f"layers.{layer}.{name}"))

    block.register_forward_pre_hook(load_next)
    model.layers = nn.ModuleList([block] * base.config.num_hidden_layers)


def _bytes_needed(config: ModelConfig, batch: Gathered) -> int:
    """Return an upper bound: one block, what is outside the blocks, and a pass through them."""
    shapes = parameter_shapes(config)
    weights = count_elements(shapes.block) + count_elements(shapes.outside)
    widths = 8 * config.hidden_size + 4 * config.intermediate_size
    return 4 * (weights + batch[0].size * widths) + 2**28
