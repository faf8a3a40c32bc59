"""Activation checkpointing: what a block saves, and what its backward pass computes again."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    SelectiveCheckpointContext,
    checkpoint,
    create_selective_checkpoint_contexts,
)

T = TypeVar("T")
_OPS = torch.ops.aten
_PRODUCTS = (_OPS.mm.default, _OPS.addmm.default)
# Of the products on a CPU (model/attention.py) only that with the values is kept: the scores would
# take T numbers for each token and head.
_ATTENTION = (
    _OPS.bmm.default,
    _OPS._scaled_dot_product_flash_attention.default,
    _OPS._scaled_dot_product_flash_attention_for_cpu.default,
    _OPS._scaled_dot_product_efficient_attention.default,
    _OPS._scaled_dot_product_cudnn_attention.default,
)


def recomputed(function: Callable[..., T], *args: Any, keep_products: bool) -> T:
    """Call a method of a module, and call it again in the backward pass instead of saving.

    Args:
        function: a bound method of an ``nn.Module``.
        args: of the method; kept until the backward pass.
        keep_products: still save the results of matrix products and attention, so that the
            backward pass recomputes only what is cheap. With dropout it recomputes attention too:
            random numbers must be drawn in the same order again.
    """
    module: nn.Module = function.__self__  # type: ignore[attr-defined]
    is_random = any(getattr(each, "dropout", 0.0) for each in module.modules())
    options: dict[str, Any] = {}
    if keep_products:
        kept = _PRODUCTS if is_random else (*_PRODUCTS, *_ATTENTION, *_varlen())
        policy = partial(_choose, kept)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    out: T = checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=is_random, **options
    )
    return out


def _choose(
    kept: tuple[Any, ...], _: SelectiveCheckpointContext, op: Any, *args: Any, **kwargs: Any
) -> CheckpointPolicy:
    # DoRA multiplies weights to get the lengths of rows (lora.row_lengths), without gradients. The
    # result is as large as the weights: it isn't kept.
    of_weights = op in _PRODUCTS and not torch.is_grad_enabled()
    if op in kept and not of_weights:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _varlen() -> tuple[Any, ...]:
    """Return the operator of ``varlen_attn``, if ``has_varlen`` registered it."""
    found = getattr(torch.ops.torch_attn, "_varlen_attn", None)
    return () if found is None else (found.default,)
