"""Cost of a model by arithmetic: parameters and FLOPs. device_memory.py and traffic.py go on."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from minigpt_cli.model import lora
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.gpt import meta_model
from minigpt_cli.recipe import AdapterSettings

Shape = tuple[int, ...]
# A part of a name -> the part of the model; the first match wins.
_PARTS = (
    (lora.MARK, "adapters"),
    ("embed_tokens", "token embeddings"),
    ("embed_positions", "position embeddings"),
    ("lm_head", "output projection"),
    ("norm", "norms"),
    ("self_attn", "attention"),
    ("mlp", "MLP"),
)

# Dense peak of matrix products in bf16 or fp16, FLOP/s, from the makers' data sheets (the figures
# there marked "with sparsity" are twice these). First match wins: longer names stand first.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 149.7e12,
    "A6000": 154.8e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


@dataclass(frozen=True)
class ParameterShapes:
    """The shapes of one block's parameters and of those outside the blocks.

    Attributes:
        block, outside: trained ones.
        frozen_linear, frozen_norms: one block's that a run with adapters doesn't train.
        frozen_outside: the same, outside the blocks.
    """

    block: tuple[Shape, ...]
    outside: tuple[Shape, ...]
    frozen_linear: tuple[Shape, ...] = ()
    frozen_norms: tuple[Shape, ...] = ()
    frozen_outside: tuple[Shape, ...] = ()

    @property
    def matrices(self) -> tuple[Shape, ...]:
        """Those of one block's trained parameters that have two dimensions."""
        return tuple(shape for shape in self.block if len(shape) == 2)


def parameter_shapes(
    config: ModelConfig, adapter: AdapterSettings | None = None
) -> ParameterShapes:
    """Return the shapes of a model's parameters.

    Args:
        config: the model.
        adapter: attached to it; None: the whole model is trained.
    """
    one_block = meta_model(replace(config, num_hidden_layers=1))
    if adapter is not None:
        lora.attach(one_block, adapter)
    found: dict[str, list[Shape]] = {}
    for name, p in one_block.named_parameters():
        place = "block" if name.startswith("layers.") else "outside"
        if not p.requires_grad and place == "outside":
            place = "frozen_outside"
        elif not p.requires_grad:
            place = "frozen_norms" if "norm" in name else "frozen_linear"
        found.setdefault(place, []).append(tuple(p.shape))
    made = {place: tuple(shapes) for place, shapes in found.items()}
    return ParameterShapes(**{"block": (), "outside": ()} | made)


def adapted_layers(config: ModelConfig, adapter: AdapterSettings) -> list[Shape]:
    """Return (inputs, outputs) of each layer of a block that has an adapter."""
    one_block = meta_model(replace(config, num_hidden_layers=1))
    lora.attach(one_block, adapter)
    layers = lora.adapted(one_block).values()
    return [(layer.in_features, layer.out_features) for layer in layers]


def count_elements(shapes: Iterable[Shape], shards: int = 1) -> int:
    """Count numbers on a device: of each tensor the rows of the largest shard, to which FSDP2
    pads."""
    return sum(-(-rows // shards) * math.prod(rest) for rows, *rest in shapes)


def parameter_count(config: ModelConfig) -> int:
    """Every trainable number, tied embeddings counted once."""
    shapes = parameter_shapes(config)
    return config.num_hidden_layers * count_elements(shapes.block) + count_elements(shapes.outside)


def parameters_by_part(
    config: ModelConfig, adapter: AdapterSettings | None = None
) -> dict[str, int]:
    """Count parameters: embeddings, positions, attention, mlp, norms, output projection, adapters.

    Parts without parameters are left out: tied embeddings are the output projection too.
    """
    one_block = meta_model(replace(config, num_hidden_layers=1))
    if adapter is not None:
        lora.attach(one_block, adapter)
    parts: dict[str, int] = {}
    for name, p in one_block.named_parameters():
        part = next(part for mark, part in _PARTS if mark in name)
        copies = config.num_hidden_layers if name.startswith("layers.") else 1
        parts[part] = parts.get(part, 0) + copies * p.numel()
    return parts


def flops_per_token(config: ModelConfig, sequence_length: int, adapters: int | None = None) -> int:
    """FLOPs of forward and backward for one token: 6N + 12 L H T (Chowdhery et al. 2022, App. B).

    Where only so many parameters of ``adapters`` are trained, frozen weights get no gradient: 4N.

    N leaves out the embeddings that are only looked up. H is the width of attention. Recomputed
    activations and the causal mask's savings don't count, so MFU compares across tools.
    """
    c = config
    looked_up = c.max_position_embeddings * c.hidden_size if c.family == "gpt2" else 0
    if not c.tie_word_embeddings:
        looked_up += c.vocab_size * c.hidden_size
    width = c.num_attention_heads * c.head_dim
    used = parameter_count(c) - looked_up
    matrices = 6 * used if adapters is None else 4 * used + 6 * adapters
    return matrices + 12 * c.num_hidden_layers * width * sequence_length


def peak_flops(device_name: str) -> float | None:
    """The device's dense bf16 peak in FLOP/s, or None where it isn't known (every CPU)."""
    if "Laptop" in device_name:  # slower than the desktop card of the same name
        return None
    return next(
        (peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None
    )
