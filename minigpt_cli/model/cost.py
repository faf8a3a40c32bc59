"""What a model costs, by arithmetic: parameters and FLOPs, and what devices can do."""

import math
import re

from minigpt_cli.model.config import ModelConfig

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


def parameter_shapes(config: ModelConfig) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The shapes of one block's parameters, and of those outside the blocks."""
    c = config
    gpt2 = c.family == "gpt2"
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    norm: list[tuple[int, ...]] = [(c.hidden_size,)] * (2 if gpt2 else 1)
    inner = [(c.intermediate_size, c.hidden_size)] * (1 if gpt2 else 2)
    attention = [(q + 2 * kv, c.hidden_size)] if gpt2 else [(n, c.hidden_size) for n in (q, kv, kv)]
    attention.append((c.hidden_size, q))
    mlp = [*inner, (c.hidden_size, c.intermediate_size)]
    block: list[tuple[int, ...]] = [*norm, *norm, *attention, *mlp]
    biased = attention * c.attention_bias + mlp * c.mlp_bias
    block += [(rows,) for rows, _ in biased]
    if c.family == "qwen3":
        block += [(c.head_dim,)] * 2
    outside = [(c.vocab_size, c.hidden_size)] * (1 if c.tie_word_embeddings else 2)
    if gpt2:
        outside.append((c.max_position_embeddings, c.hidden_size))
    return block, [*outside, *norm]


def parameter_count(config: ModelConfig) -> int:
    """Every trainable number, tied embeddings counted once."""
    block, outside = parameter_shapes(config)
    return config.num_hidden_layers * sum(map(math.prod, block)) + sum(map(math.prod, outside))


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
