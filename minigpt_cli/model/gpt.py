"""The transformer: one model for gpt2, llama and qwen3. No I/O and no distributed code.

Shapes in comments: B sequences, T tokens, H hidden size, A attention heads, K key/value heads,
D head dimension, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt_cli.core.seed import derived_seed
from minigpt_cli.model.attention import has_varlen
from minigpt_cli.model.block import Block
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.cross_entropy import (
    LossKernel,
    eager_loss_and_gradient,
    projected_cross_entropy,
)
from minigpt_cli.model.kv_cache import KVCache
from minigpt_cli.model.norm import Norm
from minigpt_cli.model.padding import padded_positions, padding_mask
from minigpt_cli.model.precision import autocast_dtype
from minigpt_cli.model.random_rows import random_rows
from minigpt_cli.model.rotary import rope_table
from minigpt_cli.model.segments import segment_boundaries, segment_mask, segment_positions
from minigpt_cli.model.workload import Checkpointing


class _NoChange(torch.autograd.Function):
    """Return zeros, the first block's ``change``, with a gradient that is dropped.

    What the other blocks get has a gradient too. Else the first one would be compiled separately.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros_like(x, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class Head(nn.Linear):
    """The output projection; a module that runs, so that FSDP gathers its weight only for that."""

    def forward(self, x: Tensor, output: Callable[[Tensor, Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        """Return ``output(x, weight)``."""
        return output(x, self.weight)


class GPT(nn.Module):
    """A decoder-only language model.

    Parameters are named after transformers' Llama, without its ``model.`` prefix; tied output
    embeddings have no name of their own. ``initialize_weights`` draws the weights.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.config = config
        self.checkpoint_activations: Checkpointing = False
        self.loss_kernel: LossKernel = eager_loss_and_gradient
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        if c.family == "gpt2":
            self.embed_positions = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.norm_eps, layer_norm=c.family == "gpt2")
        if not c.tie_word_embeddings:
            self.lm_head = Head(c.hidden_size, c.vocab_size, bias=False)
        self.packed_head: nn.Module | None = None  # of generate/packed.py
        self._rope: tuple[Tensor, Tensor] | None = None

    def ends(self) -> tuple[nn.Embedding, Head] | None:
        """Return the embedding and the output projection; None if they share their weight."""
        return None if self.config.tie_word_embeddings else (self.embed_tokens, self.lm_head)

    def head_weight(self) -> Tensor:
        """Return the output projection, (V, H)."""
        tied = self.config.tie_word_embeddings
        return self.embed_tokens.weight if tied else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        segment_ids: Tensor | None = None,
        num_segments: int | None = None,
        *,
        cache: KVCache | None = None,
        padding: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """Compute the sum of the token losses; without targets, the logits.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64, the token after each input; -100 is left out of the loss.
            segment_ids: (B, T) int64, the segment of each token in its sequence. Attention stays
                within a segment, and positions start from 0 in each. Not with a cache.
            num_segments: in all rows together. None: they are counted where that matters, which
                waits for the device.
            cache: keys and values of the earlier tokens; extended in place.
            padding: (B,) int64, the leading entries of each row that are no tokens: nothing sees
                them, and positions start from 0 after them. Only with a cache.
            logits_to_keep: number of last positions to compute logits for; 0: all.

        Returns:
            A float32 scalar (float64 for a float64 model), or logits (B, T or logits_to_keep, V).
        """
        past = cache.length if cache is not None else 0
        end = past + input_ids.shape[1]
        assert end <= self.config.max_position_embeddings, (
            f"{end} positions in a model of {self.config.max_position_embeddings}"
        )
        x = self.embed_tokens(input_ids)  # (B, T, H)
        rope = mask = None
        positions: slice | Tensor = slice(past, end)
        if segment_ids is not None:
            assert cache is None
            positions = segment_positions(segment_ids)
            mask = self._segment_mask(x, segment_ids, num_segments)
        if padding is not None:
            assert cache is not None
            positions, mask = padded_positions(padding, past, end), padding_mask(padding, past, end)
        if self.config.family == "gpt2":
            x = x + self.embed_positions.weight[positions]
        else:
            cos, sin = self._rope_table(x, end)
            rope = (cos[positions], sin[positions])
        x = F.dropout(x, self.config.dropout, self.training)
        recompute = self.checkpoint_activations if self.training else False
        batch, x = len(x), x.flatten(0, 1)
        change: Tensor = _NoChange.apply(x, autocast_dtype(x))
        for index, layer in enumerate(self.layers):
            kept = cache.layer(index) if cache is not None else None
            x, change = layer(x, change, batch, rope, kept, mask, recompute)
        if cache is not None:
            cache.length = end
        x = self.last_norm(x, change)
        if targets is None:
            x = x.unflatten(0, (batch, -1))[:, -logits_to_keep:]  # -0: all
        if self.packed_head is not None:
            assert targets is None, "packed weights are for logits only"
            logits: Tensor = self.packed_head(x)
            return logits
        output = partial(self._output, targets=targets)
        if self.config.tie_word_embeddings:
            return output(x, self.embed_tokens.weight)
        logits_or_loss: Tensor = self.lm_head(x, output)
        return logits_or_loss

    def _output(self, x: Tensor, weight: Tensor, targets: Tensor | None) -> Tensor:
        """Return the loss, or without targets the logits; weight: the output projection, (V, H)."""
        if targets is None:
            return F.linear(x, weight)
        return projected_cross_entropy(x, weight, targets.flatten(), kernel=self.loss_kernel)

    def last_norm(self, x: Tensor, change: Tensor) -> Tensor:
        """Return the input of the output projection, in the dtype of matrix products."""
        out: Tensor = self.norm(x + change)
        return out.to(autocast_dtype(x))

    def _segment_mask(self, x: Tensor, segment_ids: Tensor, num_segments: int | None) -> Tensor:
        """Return what keeps the segments apart, for ``causal_attention``."""
        dropout = self.config.dropout if self.training else 0.0
        if has_varlen(x.device, autocast_dtype(x), self.config.head_dim, dropout):
            boundaries = segment_boundaries(segment_ids, num_segments)
            torch._dynamo.maybe_mark_dynamic(boundaries, 0)  # or blocks are compiled again
            return boundaries
        return segment_mask(segment_ids)

    def _rope_table(self, x: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Return the table of angles, made once per device.

        It is no buffer, so that checkpoints and the meta device don't contain it. It starts with
        at most 4,096 positions: a context of 131,072 would take 134 MB.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        table, c = self._rope, self.config
        fits = table is not None and len(table[0]) >= positions
        if not fits or table is None or table[0].device != x.device or table[0].dtype != dtype:
            rows = min(c.max_position_embeddings, max(4096, 1 << (positions - 1).bit_length()))
            with torch.inference_mode(False):  # sampling may make it; training uses it too
                table = self._rope = rope_table(
                    rows, c.head_dim, c.rope_theta, x.device, dtype, c.rope_scaling
                )
        return table


def meta_model(config: ModelConfig) -> GPT:
    """Build the model on the meta device: names, shapes and dtypes without memory."""
    with torch.device("meta"):
        return GPT(config)


def copy_values(parameter: Tensor, values: Tensor) -> None:
    """Fill a parameter in place, without autograd."""
    with torch.no_grad():
        parameter.copy_(values)


# Returns the rows from the first argument to the second (exclusive) of a parameter.
Rows = Callable[[int, int], Tensor]


def fill_all_rows(parameter: Tensor, rows: Rows) -> None:
    """Fill a parameter that is not sharded."""
    copy_values(parameter, rows(0, len(parameter)))


def initialize_weights(
    model: GPT, seed: int, fill: Callable[[Tensor, Rows], None] = fill_all_rows
) -> None:
    """Draw the weights: normal with ``initializer_range``, biases 0, norms 1.

    Projections that write to the residual stream get ``initializer_range / sqrt(2 layers)``, so
    that its variance does not grow with depth (Radford et al. 2019, section 2.3). Each parameter
    is drawn from (seed, name), so that order, device and sharding don't matter.

    Args:
        fill: fills a parameter (first argument), which may be sharded, with its rows, of which it
            asks for those that it needs.
    """
    std = model.config.initializer_range
    residual_std = std / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "norm" in name:
            nn.init.ones_(parameter)
        else:
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            spread = residual_std if into_residual else std
            fill(parameter, _normal_rows(parameter.shape, derived_seed(seed, name), spread))


def _normal_rows(shape: torch.Size, seed: int, std: float) -> Rows:
    def draw(values: Tensor, generator: torch.Generator) -> None:
        values.normal_(0.0, std, generator=generator)

    return lambda begin, end: random_rows(shape, begin, end, seed, draw)
