"""torch.optim.Muon with equal shapes in one product, and an update that can be called off."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_BATCH_ELEMENTS = 2**26  # of matrices orthogonalised together: bounds the memory this takes


class Muon(torch.optim.Muon):
    """torch.optim.Muon's update (Jordan et al. 2024), state and defaults; another ``step``.

    Small matrices leave a device idle, so those of one shape go through Newton-Schulz as one batch.
    Set ``call_off`` before a step to a scalar on the device: where it is 1, weights and momentum
    stay as they are, and nothing waits to find out.
    """

    call_off: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for batch in _batches([p for p in group["params"] if p.grad is not None]):
                self._update(batch, group)

    def _update(self, batch: list[Tensor], group: dict[str, Any]) -> None:
        grads = torch.stack([p.grad for p in batch if p.grad is not None])
        momenta = [self._momentum(p) for p in batch]
        momentum = torch.stack(momenta)
        if self.call_off is not None:
            called_off = self.call_off.bool()
            grads = torch.where(called_off, momentum, grads)  # leaves the momentum as it is
        momentum.lerp_(grads, 1 - group["momentum"])
        direction = grads.lerp_(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = orthogonalize(direction, group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = batch[0].shape
        scaled_lr = group["lr"] * math.sqrt(max(1, rows / columns))
        weights = torch.stack(batch)
        updated = weights.mul(1 - group["lr"] * group["weight_decay"])
        updated.add_(update, alpha=-scaled_lr)
        if self.call_off is not None:
            updated = torch.where(called_off, weights, updated)
        torch._foreach_copy_(momenta, list(momentum.unbind()))
        torch._foreach_copy_(batch, list(updated.unbind()))

    def _momentum(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer: Tensor = state["momentum_buffer"]
        return buffer


def orthogonalize(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """About U V^T of each matrix U S V^T, by a quintic Newton-Schulz iteration in bf16.

    Args:
        matrices: (N, rows, columns).
    """
    a, b, c = coefficients
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT.contiguous()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _batches(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters of one shape, not too many at once."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for p in parameters:
        by_shape.setdefault(p.shape, []).append(p)
    for shape, same in by_shape.items():
        size = max(1, _BATCH_ELEMENTS // shape.numel())
        for start in range(0, len(same), size):
            yield same[start : start + size]
