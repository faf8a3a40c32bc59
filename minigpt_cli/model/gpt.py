"""The transformer: one model for the families gpt2, llama and qwen3. No I/O, no distributed code.

Shapes in comments: B sequences, T tokens, H hidden size, A attention heads, K key/value heads,
D head dimension, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minigpt_cli.model.attention import cached_attention, causal_attention
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.cross_entropy import projected_cross_entropy
from minigpt_cli.model.norm import Norm
from minigpt_cli.recipe import RopeScaling


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, each (layers, B, K, capacity, D)."""

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
    """An empty cache for ``batch`` sequences of up to ``capacity`` tokens."""
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


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of x are computed in: autocast's dtype where it is on."""
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
    """Cosine and sine of RoFormer's angles (Su et al. 2021), each (positions, 1, head_dim).

    The two halves of a head are the real and imaginary parts, as in transformers.
    """
    exponents = torch.arange(0, head_dim, 2, device=device).to(dtype) / head_dim
    # In transformers' order: at position 100,000 the last bit is the third digit of an angle.
    frequencies = _scaled(1.0 / theta**exponents, scaling)
    angles = torch.outer(torch.arange(positions, device=device).to(dtype), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos()[:, None], angles.sin()[:, None]


def _scaled(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Angles per position for contexts longer than the original one.

    ``linear`` slows all of them (Chen et al. 2023). ``llama3`` slows those that turn less than
    ``low_freq_factor`` times within the original context, leaves those that turn more than
    ``high_freq_factor`` times, and goes from one to the other in between (Llama 3.1).
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


def positions_in(segment_ids: Tensor) -> Tensor:
    """The place of each token in its segment, (B, T) int64: 0, 1, 2 ... and anew in the next."""
    places = torch.arange(segment_ids.shape[1], device=segment_ids.device).expand_as(segment_ids)
    begins = torch.nn.functional.pad(segment_ids.diff(dim=1) != 0, (1, 0), value=True)
    return places - places.where(begins, 0).cummax(dim=1).values


def mask_of(segment_ids: Tensor) -> Tensor:
    """Whether a token (row) sees another (column), (B, 1, T, T): of its segment, not later."""
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return same.tril()[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (B, T, heads, D) by the angles of its positions; cos and sin are (T or B, T; 1, D)."""
    real, imaginary = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-imaginary, real), dim=-1) * sin


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
        rope: tuple[Tensor, Tensor] | None,
        cache: LayerCache | None,
        mask: Tensor | None,
    ) -> Tensor:
        batch, tokens, _ = x.shape
        if self.gpt2:
            q, k, v = self.qkv_proj(x).chunk(3, dim=-1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
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
            y = cached_attention(q.to(k.dtype), k, v)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(batch, tokens, -1))
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
        rope: tuple[Tensor, Tensor] | None,
        cache: LayerCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        # Cast once: autocast would cast anew for each of the projections that follow.
        dtype = compute_dtype(x)
        attended = self.self_attn(self.input_layernorm(x).to(dtype), rope, cache, mask)
        x = x + F.dropout(attended, self.dropout, self.training)
        out: Tensor = self.mlp(self.post_attention_layernorm(x).to(dtype))
        return x + F.dropout(out, self.dropout, self.training)


class GPT(nn.Module):
    """A decoder-only language model.

    Parameters are named after transformers' Llama, without its ``model.`` prefix; tied output
    embeddings have no name of their own. ``initialize`` draws the weights.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.config = config
        self.checkpoint_activations = False
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        if c.family == "gpt2":
            self.embed_positions = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = Norm(c.hidden_size, c.norm_eps, layer_norm=c.family == "gpt2")
        if not c.tie_word_embeddings:
            self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self._rope: tuple[Tensor, Tensor] | None = None

    def head_weight(self) -> Tensor:
        """The output projection, (V, H)."""
        tied = self.config.tie_word_embeddings
        return self.embed_tokens.weight if tied else self.lm_head.weight

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor | None = None,
        segment_ids: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        logits_to_keep: int = 0,
    ) -> Tensor:
        """The sum of the token losses, or the logits where there are no targets.

        Args:
            input_ids: (B, T) int64.
            targets: (B, T) int64, the token after each input; -100 counts for nothing.
            segment_ids: (B, T) int64, which example of its row each token belongs to: it sees no
                other, and its positions begin anew with it. Not with a cache.
            cache: keys and values of the tokens before these; extended in place.
            logits_to_keep: compute logits for so many last positions only; 0: for all.

        Returns:
            A float32 scalar (float64 for a float64 model), or logits (B, T or 1, V).
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
            positions, mask = positions_in(segment_ids), mask_of(segment_ids)
        if self.config.family == "gpt2":
            x = x + self.embed_positions.weight[positions]
        else:
            cos, sin = self._rope_table(x, end)
            rope = (cos[positions], sin[positions])
        x = F.dropout(x, self.config.dropout, self.training)
        for index, layer in enumerate(self.layers):
            if self.checkpoint_activations and self.training:
                x = checkpoint(layer, x, rope, None, mask, use_reentrant=False)
            else:
                x = layer(x, rope, cache.layer(index) if cache is not None else None, mask)
        if cache is not None:
            cache.length = end
        if logits_to_keep:
            x = x[:, -logits_to_keep:]
        x = self.norm(x).to(compute_dtype(x))
        if targets is not None:
            return projected_cross_entropy(x.flatten(0, 1), self.head_weight(), targets.flatten())
        return F.linear(x, self.head_weight())

    def _rope_table(self, x: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Made once per device; not a buffer, so that no checkpoint or meta device meets it.

        At first for 4,096 positions at most: a context of 131,072 would take 134 MB.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        table, c = self._rope, self.config
        fits = table is not None and len(table[0]) >= positions
        if not fits or table is None or table[0].device != x.device or table[0].dtype != dtype:
            rows = min(c.max_position_embeddings, max(4096, 1 << (positions - 1).bit_length()))
            with torch.inference_mode(False):  # sampling may come first; training uses it too
                table = self._rope = rope_table(
                    rows, c.head_dim, c.rope_theta, x.device, dtype, c.rope_scaling
                )
        return table


def meta_model(config: ModelConfig) -> GPT:
    """Build the model on the meta device: names, shapes and dtypes without memory."""
    with torch.device("meta"):
        return GPT(config)


def copy(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        parameter.copy_(values)


def initialize(model: GPT, seed: int, assign: Callable[[Tensor, Tensor], None] = copy) -> None:
    """Draw the weights: normal with ``initializer_range``, biases 0, norms 1.

    Projections that write to the residual stream get ``initializer_range / sqrt(2 layers)``, so
    that its variance does not grow with depth (Radford et al. 2019, section 2.3). Each parameter
    is drawn from a generator of its own, seeded by (seed, name): the same weights whatever the
    order, the device or the sharding.

    Args:
        assign: fills a parameter (the first) from the whole of its values (the second); where
            parameters are sharded it takes this rank's part.
    """
    std = model.config.initializer_range
    residual_std = std / math.sqrt(2 * model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        elif "norm" in name:
            nn.init.ones_(parameter)
        else:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            values = torch.empty(parameter.shape, dtype=torch.float32)
            values.normal_(0.0, residual_std if into_residual else std, generator=generator)
            assign(parameter, values)
