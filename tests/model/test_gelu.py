"""GELU against its formula in float64."""

import math

import pytest
import torch
from torch import Tensor

from minigpt_cli.model import gelu as module
from minigpt_cli.model.gelu import gelu


def by_formula(x: Tensor) -> Tensor:
    x = x.double()
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def by_autograd(x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().double().requires_grad_()
    out = by_formula(x)
    out.backward(grad.double())
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("block", [64, 1 << 18])
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    numbers = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(50, 21, generator=numbers)).to(dtype).requires_grad_()
    grad = torch.randn(50, 21, generator=numbers).to(dtype)
    expected, expected_grad = by_autograd(x, grad)
    out = gelu(x)
    out.backward(grad)
    assert x.grad is not None
    assert out.dtype == x.grad.dtype == dtype
    half_ulp = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out.double(), expected, rtol=1.01 * half_ulp, atol=3e-7)
    # The derivative is rounded, and its product with the gradient.
    torch.testing.assert_close(x.grad.double(), expected_grad, rtol=2.02 * half_ulp, atol=3e-6)


def test_every_bfloat16_number() -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16)
    x = x[x.abs() < 1e18].requires_grad_()  # the square of more overflows in float32
    out = gelu(x)
    out.sum().backward()
    assert x.grad is not None
    expected, slope = by_autograd(x, torch.ones_like(x))
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), slope, rtol=2**-8, atol=1e-6)


def test_an_input_that_is_not_contiguous() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 40).bfloat16().T.requires_grad_()
    (slope,) = torch.autograd.grad(gelu(x).sum(), x)
    torch.testing.assert_close(slope.double(), by_autograd(x, torch.ones_like(x))[1], rtol=0.01,
                               atol=1e-6)  # fmt: skip


def test_compiled_it_has_the_same_values() -> None:
    compiled = torch.compile(gelu, backend="aot_eager")  # it needs no C++ compiler
    torch.manual_seed(0)
    x = (3 * torch.randn(64, 48)).bfloat16().requires_grad_()
    grad = torch.randn(64, 48).bfloat16()
    out = compiled(x)
    out.backward(grad)
    assert x.grad is not None
    expected, expected_grad = by_autograd(x, grad)
    torch.testing.assert_close(out.double(), expected, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), expected_grad, rtol=2**-7, atol=1e-5)
