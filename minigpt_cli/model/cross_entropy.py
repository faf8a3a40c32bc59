"""Output projection and cross-entropy in one function, without the whole logit tensor."""

from typing import Any

import torch
from torch import Tensor

from minigpt_cli.core.constants import IGNORE_INDEX, LOGITS_BYTES


class _ProjectedCrossEntropy(torch.autograd.Function):
    """Compute the gradients in the forward pass, chunk by chunk.

    The usual way keeps N x V logits in float32, and their gradient: 13 GB for 32,768 tokens of
    GPT-2's vocabulary. Here each chunk of logits gives its loss and its gradient
    (softmax - one_hot) and is freed. The number of matrix products stays three.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wants_grad, wants_weight = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[1]
        losses = hidden.new_empty(targets.shape, dtype=dtype)
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        # None if the projection is frozen.
        grad_weight = torch.zeros_like(weight, dtype=dtype) if wants_weight else None
        for start in range(0, len(targets), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            rows, kept = hidden[part], (targets[part] != IGNORE_INDEX)[:, None]
            index = targets[part, None].where(kept, 0)
            logits = rows @ weight.T  # (n, V)
            probabilities = logits.softmax(-1, dtype=dtype)
            # -log p[target], relative to the likeliest token: exact also if p[target] underflows.
            likeliest = logits.amax(-1, keepdim=True).to(dtype) - logits.gather(1, index)
            loss = likeliest - probabilities.amax(-1, keepdim=True).log()
            losses[part] = loss.where(kept, 0.0).squeeze(1)
            del logits  # the largest tensors of a step: free each after its last use
            if grad_hidden is not None:
                probabilities.scatter_add_(1, index, loss.new_full((1, 1), -1.0).expand_as(loss))
                grad = probabilities.to(hidden.dtype)  # of the logits: softmax - one_hot
                del probabilities
                grad_hidden[part] = (grad @ weight).where(kept, 0.0)
                if grad_weight is not None:
                    grad_weight += grad.T @ rows.where(kept, 0.0)
                del grad
        if wants_grad:
            ctx.save_for_backward(grad_hidden, grad_weight)
            ctx.weight_dtype, ctx.chunk_tokens = weight.dtype, chunk_tokens
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        (scale,) = grads
        scaled = torch.empty_like(grad_hidden)
        for start in range(0, len(scaled), ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            scaled[part] = grad_hidden[part].to(scale.dtype) * scale  # rounded once, at the end
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return scaled, grad_weight, None, None


def default_chunk_tokens(device_type: str, vocab_size: int) -> int:
    """Return the rows of logits that live at once: a multiple of 128."""
    budget = LOGITS_BYTES.get(device_type, LOGITS_BYTES["cuda"])
    return max(128, budget // (4 * vocab_size) // 128 * 128)


def projected_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None
) -> Tensor:
    """Compute the sum over tokens of ``-log softmax(hidden @ weight.T)[target]``.

    Args:
        hidden: (N, H), in the dtype of the matrix products.
        weight: (V, H), the output projection; cast to hidden's dtype.
        targets: (N,) int64; tokens with ``IGNORE_INDEX`` are left out.
        chunk_tokens: rows of logits that live at once; default: ``default_chunk_tokens``.

    Returns:
        A scalar: float32, or float64 if hidden is float64.
    """
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(hidden.device.type, len(weight))
    # Outside the Function, so that autograd casts the gradient back.
    weight = weight.to(hidden.dtype)
    if not torch.is_grad_enabled():  # a Function can't see this
        weight = weight.detach()
    loss: Tensor = _ProjectedCrossEntropy.apply(hidden, weight, targets, chunk_tokens)
    return loss
