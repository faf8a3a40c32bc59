"""torch.optim.Muon with equal shapes in one batch, and an update that can be skipped."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from minigpt_cli.core.constants import MUON_ELEMENTS
from minigpt_cli.distributed.parallel import num_shards, over_whole_matrices, to_local


class Muon(torch.optim.Muon):
    """The update, state and defaults of torch.optim.Muon (Jordan et al. 2024) in another ``step``.

    Small matrices leave a device idle, so matrices of one shape go through Newton-Schulz as one
    batch. If they are sharded, each rank orthogonalises some of them.

    Attributes:
        skip_update: a scalar on the device, set before each step; where it is 1, weights and
            momentum stay as they are. Nothing waits for its value.
        grad_factor: a scalar on the device, set before each step; multiplies the gradients.
    """

    skip_update: Tensor | None = None
    grad_factor: Tensor | None = None

    def __init__(self, params: Sequence[Tensor], **settings: Any):
        """Create the optimizer with all momenta zero.

        Args:
            params: matrices, sharded or not.
            **settings: those of torch.optim.Muon.
        """
        super().__init__(list(params), **settings)
        for p in params:
            self.state[p] = {"momentum_buffer": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            for batch in _batches([p for p in group["params"] if p.grad is not None]):
                self._update(batch, group)

    def _update(self, batch: list[Tensor], group: dict[str, Any]) -> None:
        # One tensor of all gradients: a few launches for all of them, not some for each.
        gradient = torch.stack(to_local([p.grad for p in batch if p.grad is not None]))
        momenta = to_local([self.state[p]["momentum_buffer"] for p in batch])
        weights = to_local(batch)
        lr: float | Tensor = group["lr"]
        if self.grad_factor is not None:
            gradient *= self.grad_factor
        if self.skip_update is not None:
            # A gradient equal to the momentum leaves the momentum as it is.
            gradient = torch.where(self.skip_update.bool(), torch.stack(momenta), gradient)
            lr = lr * (1 - self.skip_update)
        torch._foreach_lerp_(momenta, gradient.unbind(), 1 - group["momentum"])
        if group["nesterov"]:
            torch._foreach_lerp_(gradient.unbind(), momenta, group["momentum"])
            direction = gradient.bfloat16()
        else:
            direction = torch.stack(momenta).bfloat16()
        update = over_whole_matrices(
            lambda whole: orthogonalize(
                whole, group["ns_coefficients"], group["ns_steps"], group["eps"]
            ),
            batch,
            direction,
        )
        rows, columns = batch[0].shape
        update = update.float() * (-lr * math.sqrt(max(1, rows / columns)))
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_add_(weights, list(update.unbind()))


def orthogonalize(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Approximate U V^T of each matrix U S V^T by a quintic Newton-Schulz iteration in bf16.

    Args:
        matrices: (N, rows, columns) bf16.
        coefficients: of the quintic polynomial.
        steps: the number of iterations.
        eps: the smallest norm that a matrix is divided by.

    Returns:
        (N, rows, columns) bf16.
    """
    a, b, c = coefficients
    x = matrices
    tall = x.shape[1] > x.shape[2]  # then the smaller Gram matrix stands on the right
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x.mT @ x if tall else x @ x.mT
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, *((x, factor) if tall else (factor, x)), beta=a)
    return x


def _batches(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield parameters of one shape, not too many at once."""
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for p in parameters:
        by_shape.setdefault(p.shape, []).append(p)
    for shape, same in by_shape.items():
        budget = MUON_ELEMENTS.get(same[0].device.type, MUON_ELEMENTS["cuda"])
        size = max(1, budget // shape.numel()) * num_shards(same[0])
        for start in range(0, len(same), size):
            yield same[start : start + size]
