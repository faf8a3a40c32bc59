"""The norms against their definitions, and RMSNorm's hand-made backward pass against autograd."""

import pytest
import torch

from minigpt_cli.model.norm import Norm, rms_norm

SHAPES = [(5, 16), (2, 7, 16), (2, 7, 3, 16)]


def definition(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def inputs(shape, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) + 0.5
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(shape, eps):
    x, weight = inputs(shape)
    grad = torch.randn(shape, dtype=torch.float64)
    ours, theirs = rms_norm(x, weight, eps), definition(x, weight, eps)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for mine, other in zip(
        torch.autograd.grad(ours, (x, weight), grad),
        torch.autograd.grad(theirs, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_gradcheck():
    assert torch.autograd.gradcheck(lambda *a: rms_norm(*a, 1e-3), inputs((3, 6)))


def test_layouts_that_are_not_contiguous():
    x, weight = inputs((2, 7, 3, 16))
    turned = x.transpose(1, 2)
    ours = rms_norm(turned, weight, 1e-6)
    (grad,) = torch.autograd.grad(ours.transpose(1, 2).square().sum(), x)
    (expected,) = torch.autograd.grad(definition(x, weight, 1e-6).square().sum(), x)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_comes_close(dtype):
    x, weight = inputs((4, 9, 64), dtype)
    ours = rms_norm(x, weight, 1e-6)
    assert ours.dtype == dtype
    got = torch.autograd.grad(ours.float().square().sum(), (x, weight))
    exact_x, exact_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    exact = torch.autograd.grad(
        definition(exact_x, exact_weight, 1e-6).square().sum(), (exact_x, exact_weight)
    )
    for mine, other in zip(got, exact, strict=True):
        assert mine.dtype == dtype
        assert (mine.double() - other).norm() < 3 * torch.finfo(dtype).eps * other.norm()


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_either_side_may_be_frozen(frozen):
    x, weight = inputs((5, 16))
    (x if frozen == "x" else weight).requires_grad_(False)
    rms_norm(x, weight, 1e-6).square().sum().backward()
    definition_of, other = (weight, x) if frozen == "x" else (x, weight)
    assert other.grad is None
    mine = definition_of.grad.clone()
    definition_of.grad = None
    definition(x, weight, 1e-6).square().sum().backward()
    torch.testing.assert_close(mine, definition_of.grad, rtol=0, atol=1e-12)


def test_layer_norm_follows_its_definition():
    norm = Norm(16, 0.1, layer_norm=True).double()
    x, weight = inputs((2, 7, 16))
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(weight.flip(0))
    expected = (x - x.mean(-1, keepdim=True)) / (
        x.var(-1, keepdim=True, unbiased=False) + 0.1
    ).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-12)
