"""The transformer: one model for gpt2, llama and qwen3. No I/O and no distributed code.

Shapes in comments: B sequences, T tokens, H hidden size, A attention heads, K key/value heads,
D head dimension, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt_cli.core.seed import derived_seed
from minigpt_cli.model.attention import (
    cached_attention,
    causal_attention,
    has_varlen,
    segment_boundaries,
)
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.cross_entropy import (
    LossKernel,
    eager_loss_and_gradient,
    projected_cross_entropy,
)
from minigpt_cli.model.norm import Norm
from minigpt_cli.model.padding import padded_positions, padding_mask
from minigpt_cli.model.random_rows import random_rows
from minigpt_cli.model.recompute import recomputed
from minigpt_cli.model.workload import Checkpointing
from minigpt_cli.recipe import RopeScaling


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
    return KVCache(
        torch.zeros(shape, device=device, dtype=dtype),
        torch.zeros(shape, device=device, dtype=dtype),
    )


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with x: autocast's if it is on, else x's."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def rope_table(
    positions: int,
    head_dim: int,
    theta: float,
    device: torch.device,
    dtype: torch.dtype,
    scaling: RopeScaling | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute cosine and sine of the rotary angles (Su et al. 2021), each (positions, 1, head_dim).

    The two halves of a head are the real and the imaginary part, as in transformers.
    """
    exponents = torch.arange(0, head_dim, 2, device=device).to(dtype) / head_dim
    # Operations in transformers' order: at position 100,000 the last bit of a frequency is the
    # third digit of the angle.
    frequencies = _scale_frequencies(1.0 / theta**exponents, scaling)
    angles = torch.outer(torch.arange(positions, device=device).to(dtype), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos()[:, None], angles.sin()[:, None]


def _scale_frequencies(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Scale the frequencies for contexts longer than the original one.

    ``linear`` divides all of them (Chen et al. 2023). ``llama3`` (Llama 3.1) divides those with
    fewer than ``low_freq_factor`` turns in the original context, keeps those with more than
    ``high_freq_factor``, and interpolates between the two.
    """
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert low is not None
    assert high is not None
    assert scaling.original_max_position_embeddings is not None
    turns = scaling.original_max_position_embeddings / (2 * math.pi / frequencies)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def segment_positions(segment_ids: Tensor) -> Tensor:
    """Return each token's position in its segment, (B, T) int64: 0, 1, 2 ... from each start."""
    positions = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    starts = F.pad(segment_ids.diff(dim=1) != 0, (1, 0), value=True)
    return positions - positions.where(starts, 0).cummax(dim=1).values


def segment_mask(segment_ids: Tensor) -> Tensor:
    """Return the attention mask, (B, 1, T, T) bool: true for earlier tokens of the same segment."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same.tril()[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, T, heads, D) by its positions' angles; cos, sin: (T, 1, D) or (B, T, 1, D)."""
    real, imaginary = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-imaginary, real), dim=-1) * sin


# Devices on which llama's and qwen3's queries, keys and values come from one product: it saves
# launches, which cost nothing on a CPU.
ONE_PRODUCT = {"cuda"}


def project(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Apply linear layers to one input, on a GPU by one product.

    The layers keep parameters of their own, so that files, optimizers and adapters know each. Only
    weights that are cast anyway are put together: else the backward pass would keep a copy of them.
    """
    if (
        x.device.type not in ONE_PRODUCT
        or any(type(layer) is not nn.Linear for layer in layers)  # an adapter
        or layers[0].weight.dtype == x.dtype
    ):
        return tuple(layer(x) for layer in layers)
    weights: list[Tensor] = [layer.weight for layer in layers]
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    out = F.linear(x, torch.cat(weights), torch.cat(biases) if biases else None)
    return out.split([layer.out_features for layer in layers], dim=-1)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.head_dim = c.head_dim
        self.dropout = c.dropout
        self.gpt2 = c.family == "gpt2"
        if self.gpt2:
            self.qkv_proj = nn.Linear(c.hidden_size, 3 * c.hidden_size)
        else:
            q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
            self.q_proj = nn.Linear(c.hidden_size, q_size, bias=c.attention_bias)
            self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=c.attention_bias)
            self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=c.attention_bias)
        self.o_proj = nn.Linear(
            c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.attention_bias
        )
        if c.family == "qwen3":
            self.q_norm = Norm(c.head_dim, c.norm_eps, layer_norm=False)
            self.k_norm = Norm(c.head_dim, c.norm_eps, layer_norm=False)
        self.qk_norm = c.family == "qwen3"

    def forward(
        self,
        x: Tensor,
        batch: int,
        rope: tuple[Tensor, Tensor] | None,
        cache: LayerCache | None,
        mask: Tensor | None,
    ) -> Tensor:
        tokens = len(x) // batch
        if self.gpt2:
            q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        else:
            layers = (self.q_proj, self.k_proj, self.v_proj)
            # Not for each generated token: its product costs less than the weights' copy.
            q, k, v = project(x, *layers) if cache is None else (each(x) for each in layers)
        q, k, v = (part.view(batch, tokens, -1, self.head_dim) for part in (q, k, v))
        if rope is not None:
            q, k = q.to(rope[0].dtype), k.to(rope[0].dtype)
            if self.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
            q, k = rotate(q, *rope).to(v.dtype), rotate(k, *rope).to(v.dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        # q: (B, A, T, D); k, v: (B, K, T, D)

        if cache is None:
            y = causal_attention(q, k, v, self.dropout if self.training else 0.0, mask)
        else:
            keys, values, past = cache
            end = past + tokens
            keys[:, :, past:end] = k
            values[:, :, past:end] = v
            k, v = keys[:, :, :end], values[:, :, :end]
            y = cached_attention(q.to(k.dtype), k, v, mask).to(q.dtype)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(len(x), -1))
        return out


class MLP(nn.Module):
    """GPT-2's two matrices with GELU, or SwiGLU's three (Shazeer 2020)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.gpt2 = c.family == "gpt2"
        if not self.gpt2:
            self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gpt2:
            inner = F.gelu(self.up_proj(x), approximate="tanh")
        else:
            inner = F.silu(self.gate_proj(x)) * self.up_proj(x)
        out: Tensor = self.down_proj(inner)
        return out


class _NoChange(torch.autograd.Function):
    """Return zeros, which take a gradient and drop it: else the first block is compiled apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros_like(x, dtype=dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        layer_norm = config.family == "gpt2"
        self.input_layernorm = Norm(config.hidden_size, config.norm_eps, layer_norm)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = Norm(config.hidden_size, config.norm_eps, layer_norm)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(
        self,
        x: Tensor,
        change: Tensor,
        batch: int,
        rope: tuple[Tensor, Tensor] | None,
        cache: LayerCache | None = None,
        mask: Tensor | None = None,
        recompute: Checkpointing = False,
    ) -> tuple[Tensor, Tensor]:
        """Apply the block.

        The last addition is left to the next block, where a compiler fuses it with the norm.

        Args:
            x: (B T, H), the residual stream. It is a matrix, as products take it: a compiler then
                fuses all that is between two of them.
            change: (B T, H), what the block before adds to it.
            batch: B.
            rope: cosine and sine of the positions; None for gpt2.
            cache: see ``KVCache.layer``.
            mask: see ``causal_attention``.
            recompute: what the backward pass computes again.

        Returns:
            The residual stream before this block's MLP, and what the MLP adds to it.
        """
        x = x + change
        if recompute:  # here, so that torch.compile sees it and fuses the recomputation too
            selective = recompute == "selective"
            return recomputed(self._forward, x, batch, rope, mask, keep_products=selective)
        return self._forward(x, batch, rope, mask, cache)

    def _forward(
        self,
        x: Tensor,
        batch: int,
        rope: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        cache: LayerCache | None = None,
    ) -> tuple[Tensor, Tensor]:
        # Cast once: autocast would cast again for each projection.
        dtype = autocast_dtype(x)
        attended = self.self_attn(self.input_layernorm(x).to(dtype), batch, rope, cache, mask)
        x = x + F.dropout(attended, self.dropout, self.training)
        out: Tensor = self.mlp(self.post_attention_layernorm(x).to(dtype))
        return x, F.dropout(out, self.dropout, self.training)


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
