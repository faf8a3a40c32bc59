"""A block of the transformer: attention and MLP.

Shapes in comments: B sequences, T tokens, H hidden size, A attention heads, K key/value heads,
D head dimension.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt_cli.model.attention import cached_attention, causal_attention
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.gelu import gelu
from minigpt_cli.model.kv_cache import LayerCache
from minigpt_cli.model.norm import Norm
from minigpt_cli.model.precision import autocast_dtype
from minigpt_cli.model.recompute import recomputed
from minigpt_cli.model.rotary import rotate
from minigpt_cli.model.workload import Checkpointing

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
        self.gelu_in_up_proj = False  # see generate/packed.py
        if not self.gpt2:
            self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gpt2:
            inner = self.up_proj(x)
            if not self.gelu_in_up_proj:
                inner = gelu(inner)
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
            change: (B T, H), the output of the last block's MLP; this block adds it to ``x``.
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
