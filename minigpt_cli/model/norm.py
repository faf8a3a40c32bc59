"""LayerNorm and RMSNorm."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _RMSNorm(torch.autograd.Function):
    """RMSNorm with a fused backward pass for CPUs; torch's own takes seven passes there.

    With y = x r w and r = 1 / rms(x), the gradient is r (g w - x r mean(g w x r)). LayerNorm's
    fused kernel with mean 0 gives r (g w - mean(g w) - x r mean(g w x r)); the middle term is
    added back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, torch.zeros_like(scale), scale, weight, None, (True, True, False)
        )
        mean = torch.mv(grad.flatten(0, -2), weight).view_as(scale).div_(weight.numel())
        # addcmul_ would take ten times as long: its kernel has no vectors for broadcast operands.
        return grad_x.add_(mean.mul_(scale)), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / rms(x) * weight over the last dimension, in x's dtype (Zhang, Sennrich 2019)."""
    # In bf16 the forward and the backward kernel expect different dtypes of the saved scale.
    full = x.dtype in (torch.float32, torch.float64)
    if x.device.type == "cpu" and full and x.dtype == weight.dtype:
        out: Tensor = _RMSNorm.apply(x.contiguous(), weight, eps)
        return out
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


class Norm(nn.Module):
    """LayerNorm with bias (gpt2), or RMSNorm."""

    def __init__(self, size: int, eps: float, layer_norm: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if layer_norm else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(x, weight.shape, weight, bias, self.eps)
        return rms_norm(x, self.weight, self.eps)
