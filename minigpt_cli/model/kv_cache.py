"""Keys and values of the tokens so far, for decoding."""

from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt_cli.model.config import ModelConfig


@dataclass
class KVCache:
    """Keys and values of all earlier tokens, each (layers, B, K, capacity, D)."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[3]

    def layer(self, index: int) -> "LayerCache":
        return self.keys[index], self.values[index], self.length


# One layer's part of the cache: keys and values, each (B, K, capacity, D), and the tokens in it.
LayerCache = tuple[Tensor, Tensor, int]


def new_cache(
    config: ModelConfig, batch: int, capacity: int, device: torch.device, dtype: torch.dtype
) -> KVCache:
    """Make an empty cache for ``batch`` sequences of up to ``capacity`` tokens.

    Args:
        dtype: of matrix products. On a CPU keys and values are kept in float32 at least, because
            torch's attention of one token takes 5 times as long in bf16 there.
    """
    if device.type == "cpu":
        dtype = torch.promote_types(dtype, torch.float32)
    shape = (
        config.num_hidden_layers,
        batch,
        config.num_key_value_heads,
        capacity,
        config.head_dim,
    )
    # What is beyond ``length`` is never read.
    return KVCache(
        torch.empty(shape, device=device, dtype=dtype),
        torch.empty(shape, device=device, dtype=dtype),
    )
