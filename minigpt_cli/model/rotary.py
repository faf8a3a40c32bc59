"""Rotary positions: the table of angles, and the rotation of queries and keys."""

import math

import torch
from torch import Tensor

from minigpt_cli.recipe import RopeScaling


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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, T, heads, D) by its positions' angles; cos, sin: (T, 1, D) or (B, T, 1, D)."""
    real, imaginary = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-imaginary, real), dim=-1) * sin
