"""Output projection and cross-entropy in one function, without the whole logit tensor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from minigpt_cli.core.constants import IGNORE_INDEX, LOGITS_BYTES

# (logits (n, V), targets (n,)) -> (losses (n,) float32, gradient of the logits (n, V))
LossKernel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _ProjectedCrossEntropy(torch.autograd.Function):
    """Compute the gradients in the forward pass, chunk by chunk.

    The usual way keeps N x V logits in float32, and their gradient: 13 GB for 32,768 tokens of
    GPT-2's vocabulary. Here each chunk of logits gives its loss and its gradient
    (softmax - one_hot) and is freed. The number of matrix products stays three.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk_tokens: int,
        kernel: LossKernel,
    ) -> Tensor:
        wants_grad, wants_weight = any(ctx.needs_input_grad[:2]), ctx.needs_input_grad[1]
        matrix = weight.to(hidden.dtype)
        kept = targets != IGNORE_INDEX
        targets = targets.where(kept, 0)
        # Tokens that are left out then add nothing to the weight's gradient.
        hidden = hidden.where(kept[:, None], 0)
        grad_hidden = torch.empty_like(hidden) if wants_grad else None
        grad_weight = None  # also if the projection is frozen
        losses = []
        for start in range(0, len(targets), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            rows = hidden[part]
            if grad_hidden is None:
                losses.append(token_losses(rows @ matrix.T, targets[part]))
                continue
            loss, grad = kernel(rows @ matrix.T, targets[part])
            losses.append(loss)
            torch.mm(grad, matrix, out=grad_hidden[part])
            if wants_weight:
                grad_weight = _add_product(grad_weight, grad.T, rows)
            del grad  # the largest tensor of a step
        if wants_grad:
            ctx.save_for_backward(grad_hidden, grad_weight, kept)
            ctx.weight_dtype, ctx.chunk_tokens = weight.dtype, chunk_tokens
        return torch.cat(losses).where(kept, 0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, kept = ctx.saved_tensors
        (scale,) = grads
        scaled, factors = torch.empty_like(grad_hidden), (kept * scale)[:, None]
        for start in range(0, len(scaled), ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            torch.mul(grad_hidden[part], factors[part], out=scaled[part])  # rounded once
        if grad_weight is not None:
            grad_weight = (grad_weight * scale).to(ctx.weight_dtype)
        return scaled, grad_weight, None, None, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return ``total + a @ b``, in place, and in float32 at least; without a total, the product."""
    full = torch.promote_types(a.dtype, torch.float32)
    # On a GPU the product itself adds up in float32, without rounding to the factors' dtype.
    wide: dict[str, Any] = {"out_dtype": full} if a.is_cuda and a.dtype != full else {}
    if total is None:
        return torch.mm(a, b, **wide).to(full)
    if wide or a.dtype == full:
        return torch.addmm(total, a, b, out=total, **wide)
    return total.add_(a @ b)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute ``-log softmax(logits)[target]`` of each row.

    Args:
        logits: (n, V).
        targets: (n,) int64.

    Returns:
        (n,) float32, or float64 if the logits are.
    """
    full = torch.promote_types(logits.dtype, torch.float32)
    return _token_losses(logits, logits.softmax(-1, dtype=full), targets)


def _token_losses(logits: Tensor, probabilities: Tensor, targets: Tensor) -> Tensor:
    # Relative to the likeliest token: exact also where p[target] underflows.
    likeliest = logits.amax(-1).to(probabilities.dtype) - logits.gather(1, targets[:, None])[:, 0]
    return likeliest - probabilities.amax(-1).log()


def eager_loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the losses, and softmax - one_hot, by torch's own kernels.

    Args:
        logits: (n, V).
        targets: (n,) int64.

    Returns:
        (losses (n,) float32 or float64, their gradient (n, V) in the dtype of the logits).
    """
    dtype = logits.dtype
    probabilities = logits.softmax(-1, dtype=torch.promote_types(dtype, torch.float32))
    losses = _token_losses(logits, probabilities, targets)
    del logits
    with _nothing_collides():
        probabilities.scatter_(1, targets[:, None], losses.neg().expm1()[:, None])
    return losses, probabilities.to(dtype)


def fused_loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what ``eager_loss_and_gradient`` computes; compiled, it is one kernel.

    It reads the logits and writes their gradient. Nothing else of their size is in memory.
    """
    full = logits.to(torch.promote_types(logits.dtype, torch.float32))
    shifted = full - full.amax(-1, keepdim=True)
    exponentials = shifted.exp()
    total = exponentials.sum(-1, keepdim=True)
    losses = total.log() - shifted.gather(1, targets[:, None])
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    gradient = torch.where(is_target, losses.neg().expm1(), exponentials / total)
    return losses[:, 0], gradient.to(logits.dtype)


@contextmanager
def _nothing_collides() -> Iterator[None]:
    """Let a scatter with one element per row use its ordinary kernel, which then gives the same
    bits each time. The deterministic one sorts, with 20 launches."""
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(0)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def default_chunk_tokens(device_type: str, vocab_size: int, tokens: int) -> int:
    """Return the rows of logits that live at once.

    Chunks of one size are compiled once, so the tokens are divided evenly where they can be.
    """
    budget = LOGITS_BYTES.get(device_type, LOGITS_BYTES["cuda"])
    most = max(128, budget // (4 * vocab_size) // 128 * 128)
    fewest = -(-tokens // most)
    chunks = next((n for n in range(fewest, 2 * fewest) if tokens % n == 0), None)
    return tokens // chunks if chunks else most


def projected_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int | None = None,
    kernel: LossKernel = eager_loss_and_gradient,
) -> Tensor:
    """Compute the sum over tokens of ``-log softmax(hidden @ weight.T)[target]``.

    Args:
        hidden: (N, H), in the dtype of the matrix products.
        weight: (V, H), the output projection; cast to hidden's dtype.
        targets: (N,) int64; tokens with ``IGNORE_INDEX`` are left out.
        chunk_tokens: rows of logits that live at once; default: ``default_chunk_tokens``.
        kernel: ``eager_loss_and_gradient``, or ``fused_loss_and_gradient`` compiled.

    Returns:
        A scalar: float32, or float64 if hidden is float64.
    """
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(hidden.device.type, len(weight), len(targets))
    if not torch.is_grad_enabled():  # a Function can't see this
        hidden, weight = hidden.detach(), weight.detach()
    loss: Tensor = _ProjectedCrossEntropy.apply(hidden, weight, targets, chunk_tokens, kernel)
    return loss
