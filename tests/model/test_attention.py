"""Attention against torch's kernel with an explicit mask, across the blocks it is computed in."""

import numpy as np
import pytest
import torch

from minigpt_cli.model import attention
from minigpt_cli.model.attention import (
    cached_attention,
    causal_attention,
    has_varlen,
)
from minigpt_cli.model.segments import segment_boundaries

LENGTHS = [1, 2, 127, 128, 129, 256, 300]
HEADS = [(4, 4), (4, 2), (6, 1)]


def inputs(tokens, heads, kv_heads, seen=None, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(2, heads, tokens, 8), *[(2, kv_heads, seen or tokens, 8)] * 2]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def expected(q, k, v):
    """From the definition, the last query at the last key."""
    tokens, seen = q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    ahead = torch.arange(seen) > torch.arange(seen - tokens, seen)[:, None]
    return scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_causal_attention(tokens, heads):
    parts = inputs(tokens, *heads)
    weights = torch.randn(2, heads[0], tokens, 8, dtype=torch.float64)
    for ours, theirs in zip(
        (causal_attention(*parts), *torch.autograd.grad(causal_attention(*parts), parts, weights)),
        (expected(*parts), *torch.autograd.grad(expected(*parts), parts, weights)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_long_sequences_take_torchs_kernel_and_agree():
    parts = inputs(attention.CPU_MATMUL_TOKENS + 1, 2, 1, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(causal_attention(*parts), expected(*parts))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("tokens", "seen"), [(1, 1), (1, 9), (5, 5), (5, 9), (8, 9), (2, 140)])
def test_cached_attention_looks_from_the_end(tokens, seen, heads):
    parts = inputs(tokens, *heads, seen=seen)
    torch.testing.assert_close(cached_attention(*parts), expected(*parts), rtol=0, atol=1e-12)


def test_bf16_comes_close():
    parts = inputs(200, 4, 2, dtype=torch.bfloat16)
    out = causal_attention(*parts)
    assert out.dtype == torch.bfloat16
    exact = expected(*(part.double() for part in parts))
    assert (out - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize("tokens", [5, 200])
def test_dropout_leaves_weights_out_and_keeps_the_mean(tokens):
    q, k, v = inputs(tokens, 2, 2)
    torch.manual_seed(0)
    with torch.no_grad():
        plain = causal_attention(q, k, v)
        dropped = torch.stack([causal_attention(q, k, v, 0.2) for _ in range(300)])
    assert not torch.equal(dropped[0], dropped[1])
    error = (dropped.mean(0) - plain).abs() / (dropped.std(0) / 300**0.5 + 1e-9)
    assert error.max() < 6  # standard errors


def test_a_mask_made_while_sampling_serves_training():
    attention._mask.cache_clear()
    with torch.inference_mode():
        causal_attention(*inputs(7, 2, 2))
    causal_attention(*inputs(7, 2, 2)).sum().backward()


def test_boundaries_of_segments():
    """Against a loop over the tokens."""
    rng = np.random.default_rng(0)
    for rows, length in ((1, 1), (1, 7), (3, 12), (4, 1)):
        ids = torch.from_numpy(np.sort(rng.integers(0, 5, (rows, length)), axis=1))
        flat = [(row, int(ids[row, at])) for row in range(rows) for at in range(length)]
        starts = [at for at in range(len(flat)) if at == 0 or flat[at] != flat[at - 1]]
        counted = segment_boundaries(ids)
        assert counted.dtype == torch.int32
        assert counted.tolist() == [*starts, rows * length]
        assert torch.equal(segment_boundaries(ids, len(starts)), counted)


def test_varlen_is_for_gpus():
    assert not has_varlen(torch.device("cpu"), torch.bfloat16, 64, 0.0)
