"""GELU in its tanh form (Hendrycks, Gimpel 2016), faster than torch's on a CPU.

0.5 x (1 + tanh(u)) is x sigmoid(2 u), and torch's sigmoid takes a third of the time of its tanh.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# 2 u = x (LINEAR + CUBIC x^2)
LINEAR = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715 * LINEAR
BLOCK = 1 << 17  # numbers at a time, so that what lies between two operations stays in the caches


class _Gelu(torch.autograd.Function):
    """GELU of a tensor of 16-bit numbers, in float32 within; it keeps the derivative, not x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        out, derivative = torch.empty_like(flat), torch.empty_like(flat)
        linear = torch.tensor(LINEAR)
        for start in range(0, len(flat), BLOCK):
            block = slice(start, start + BLOCK)
            x_ = flat[block].float()
            square = x_ * x_
            sigmoid = torch.add(linear, square, alpha=CUBIC).mul_(x_).sigmoid_()
            y = x_.mul_(sigmoid)
            out[block] = y
            # The derivative is s + y (1 - s) d(2 u)/dx, with s the sigmoid.
            rise = torch.add(linear, square, alpha=3 * CUBIC, out=square)
            y = y.addcmul_(y, sigmoid, value=-1)
            derivative[block] = sigmoid.addcmul_(y, rise)
        ctx.save_for_backward(derivative.view_as(x))
        return out.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (derivative,) = ctx.saved_tensors
        return grads[0] * derivative


def gelu(x: Tensor) -> Tensor:
    """Compute GELU of each number, in x's dtype."""
    if x.device.type == "cpu":
        if torch.compiler.is_compiling():
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            return (wide * torch.sigmoid(wide * (LINEAR + CUBIC * wide * wide))).to(x.dtype)
        has_16_bits = x.dtype in (torch.bfloat16, torch.float16)
        if has_16_bits and torch.is_grad_enabled() and x.requires_grad:
            out: Tensor = _Gelu.apply(x)
            return out
    return F.gelu(x, approximate="tanh")
