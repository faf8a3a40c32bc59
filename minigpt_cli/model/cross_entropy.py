"""The output projection and the cross-entropy in one, without the whole logit tensor."""

from typing import Any

import torch
from torch import Tensor

from minigpt_cli.core.constants import IGNORE_INDEX

# Bytes of float32 logits that live at once. On a CPU a chunk should stay in cache, on a GPU it
# should be large enough to fill the device with one matrix product.
CHUNK_BYTES = {"cpu": 2**22, "cuda": 2**28}


class _ProjectedCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk, while the logits are at hand.

    The usual way keeps N x V logits in float32 (and again as their gradient): 13 GB for 32,768
    tokens of GPT-2's vocabulary. Here a chunk's logits become its loss and its gradient
    (softmax - one_hot) and are dropped, at the same three matrix products in all.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int
    ) -> Tensor:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        wants_grad, wants_weight = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[1]
        losses = hidden.new_empty(targets.shape, dtype=dtype)
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        # None where the projection is frozen.
        grad_weight = torch.zeros_like(weight, dtype=dtype) if wants_weight else None
        for start in range(0, len(targets), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            rows, kept = hidden[part], (targets[part] != IGNORE_INDEX)[:, None]
            index = targets[part, None].where(kept, 0)
            logits = rows @ weight.T  # (n, V)
            probabilities = logits.softmax(-1, dtype=dtype)
            # -log p[target], also where p[target] underflows: by way of the likeliest token.
            likeliest = logits.amax(-1, keepdim=True).to(dtype) - logits.gather(1, index)
            loss = likeliest - probabilities.amax(-1, keepdim=True).log()
            losses[part] = loss.where(kept, 0.0).squeeze(1)
            del logits  # these are the largest tensors of a step, so none outlives its use
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


def projected_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None
) -> Tensor:
    """Sum over tokens of ``-log softmax(hidden @ weight.T)[target]``.

    Args:
        hidden: (N, H), in the computing dtype.
        weight: (V, H), the output projection; cast to hidden's dtype.
        targets: (N,) int64; ``IGNORE_INDEX`` marks tokens that count for nothing.
        chunk_tokens: rows of logits that exist at once; by default what the device likes.

    Returns:
        A scalar, in float32, or float64 where hidden is.
    """
    if chunk_tokens is None:
        budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
        chunk_tokens = max(128, budget // (4 * len(weight)) // 128 * 128)
    weight = weight.to(hidden.dtype)  # outside the Function: autograd casts the gradient back
    if not torch.is_grad_enabled():  # which a Function isn't told
        weight = weight.detach()
    loss: Tensor = _ProjectedCrossEntropy.apply(hidden, weight, targets, chunk_tokens)
    return loss
