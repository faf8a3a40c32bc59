"""Causal attention: torch's kernels on GPUs, matrix products on CPUs, where they are faster."""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU, torch's flash kernel took 2 to 3 times as long up to 1,024 tokens in bf16
# (benchmarks/LOG.md). Beyond this length its linear memory matters more.
CPU_MATMUL_TOKENS = 2048
QUERY_BLOCK = 128  # queries at a time; they need no keys after their own block


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, mask: Tensor | None = None
) -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) v; a token sees itself and earlier tokens.

    Args:
        q: (B, A, T, D).
        k, v: (B, K, T, D), K dividing A: each serves A/K neighbouring query heads.
        dropout: probability of dropping an attention weight.
        mask: (B, 1, T, T) bool, true for visible tokens; or the result of ``segment_boundaries``,
            where ``has_varlen``: earlier tokens of the same segment are visible. None: all
            earlier tokens are.

    Returns:
        (B, A, T, D).
    """
    tokens = q.shape[2]
    if mask is not None and mask.dim() == 1:
        return _by_varlen(q, k, v, mask)
    if mask is not None:
        # With enable_gqa and a mask, torch has only the kernel that stores all (T, T) weights.
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    if q.device.type == "cpu" and not dropout and tokens <= CPU_MATMUL_TOKENS:
        return _by_matmul(q, k, v)
    return F.scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=tokens > 1, enable_gqa=q.shape[1] != k.shape[1]
    )


def has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> bool:
    """Return whether torch's flash attention can keep segments apart by their boundaries alone.

    It needs an NVIDIA GPU of the Ampere generation or later, bf16 or fp16, heads of at most 256
    elements (a multiple of 8), and no dropout.
    """
    usable = (
        device.type == "cuda"
        and torch.version.cuda is not None
        and dtype in (torch.bfloat16, torch.float16)
        and head_dim % 8 == 0
        and head_dim <= 256
        and not dropout
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )
    if usable:
        from torch.nn.attention import varlen  # noqa: F401  2 s; it registers the operator
    return usable


def _by_varlen(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    rows, _, tokens, _ = q.shape
    # (B, A, T, D) is a view of (B, T, A, D): nothing is copied.
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (q, k, v))
    grouped: dict[str, Any] = {}
    # torch 2.11 takes grouped heads as they are; later versions want to be told.
    if q.shape[1] != k.shape[1] and "enable_gqa" in (varlen_attn.__kwdefaults__ or {}):
        grouped["enable_gqa"] = True
    out = varlen_attn(
        q, k, v, boundaries, boundaries, tokens, tokens, window_size=(-1, 0), **grouped
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, (rows, tokens)).transpose(1, 2)


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute the attention of the last T of S tokens.

    Args:
        q: (B, A, T, D), of the last tokens.
        k, v: (B, K, S, D).
        mask: (B, 1, T, S) bool, true for visible tokens; None: all earlier tokens are visible.
    """
    tokens, seen = q.shape[2], k.shape[2]
    if mask is not None:
        if tokens > 1:  # as in causal_attention
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    elif 1 < tokens < seen:  # is_causal aligns with the first key, not with the last
        mask = torch.ones(tokens, seen, dtype=torch.bool, device=q.device).tril(seen - tokens)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=mask is None and tokens > 1,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, tokens, dim = q.shape
    groups = heads // k.shape[1]
    rows = batch * k.shape[1]
    # Query heads that share a key head become rows of one product.
    q = q.reshape(rows, groups, tokens, dim)
    k = k.reshape(rows, tokens, dim).transpose(1, 2)
    v = v.reshape(rows, tokens, dim)
    # In a compiled block the masks are constants, and dynamo warns of a cache.
    make_mask = _mask.__wrapped__ if torch.compiler.is_compiling() else _mask
    out = []
    for start in range(0, tokens, QUERY_BLOCK):
        end = min(tokens, start + QUERY_BLOCK)
        mask = make_mask(start, end, groups, q.dtype).expand(rows, -1, -1)
        block = q[:, :, start:end].reshape(rows, -1, dim)
        scores = torch.baddbmm(mask, block, k[:, :, :end], alpha=dim**-0.5)
        seen = torch.bmm(scores.softmax(-1), v[:, :end])
        out.append(seen.view(rows, groups, end - start, dim))
    return torch.cat(out, dim=2).view(batch, heads, tokens, dim)


@lru_cache(maxsize=64)
def _mask(start: int, end: int, groups: int, dtype: torch.dtype) -> Tensor:
    """Return a block's mask: 0 for visible keys, -inf for others: (groups * block, end)."""
    with torch.inference_mode(False):
        hidden = torch.full((end - start, end), -torch.inf).triu(start + 1)
        return hidden.to(dtype).repeat(groups, 1)
