"""The fused projection and cross-entropy against torch's own two steps."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from minigpt_cli.core.constants import IGNORE_INDEX
from minigpt_cli.model.cross_entropy import (
    eager_loss_and_gradient,
    fused_loss_and_gradient,
    projected_cross_entropy,
)
from tests.helpers.ops import CountOps

N, H, V = 37, 8, 23


def data(dtype=torch.float64, n=N, h=H, v=V):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, h, generator=generator, dtype=torch.float64).to(dtype)
    targets = torch.randint(v, (n,), generator=generator)
    targets[::5] = IGNORE_INDEX
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def value_and_gradients(hidden, weight, targets, chunk_tokens=None, scale=1.0):
    loss = projected_cross_entropy(hidden, weight, targets, chunk_tokens)
    return loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))


def expected(hidden, weight, targets, scale=1.0):
    loss = F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=IGNORE_INDEX)
    return loss.detach(), *torch.autograd.grad(loss * scale, (hidden, weight))


@pytest.mark.parametrize("chunk_tokens", [None, 1, 5, 36, 37, 1000])
@pytest.mark.parametrize("scale", [1.0, -0.01])
def test_value_and_gradients_equal_torchs(chunk_tokens, scale):
    ours = value_and_gradients(*data(), chunk_tokens, scale)
    for mine, theirs in zip(ours, expected(*data(), scale), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_gradcheck():
    hidden, weight, targets = data(n=6, h=3, v=5)
    assert torch.autograd.gradcheck(
        lambda h, w: projected_cross_entropy(h, w, targets, 4), (hidden, weight)
    )


def test_extreme_logits_stay_finite():
    hidden, weight, targets = data()
    with torch.no_grad():
        weight *= 1e4
    ours = value_and_gradients(hidden, weight, targets)
    for mine, theirs in zip(ours, expected(hidden, weight, targets), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs)


def test_ignored_targets_alone_give_zero():
    hidden, weight, targets = data()
    for result in value_and_gradients(hidden, weight, torch.full_like(targets, IGNORE_INDEX)):
        assert (result == 0).all()


def test_ignored_tokens_have_no_gradient():
    hidden, weight, targets = data()
    _, grad, _ = value_and_gradients(hidden, weight, targets)
    assert torch.equal((grad == 0).all(-1), targets == IGNORE_INDEX)


def test_no_gradients_are_made_where_none_are_wanted():
    hidden, weight, targets = data()
    value = projected_cross_entropy(hidden, weight, targets)
    with torch.no_grad():
        assert torch.equal(projected_cross_entropy(hidden, weight, targets), value.detach())
        assert not projected_cross_entropy(hidden, weight, targets).requires_grad


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_one_side_may_be_frozen(frozen):
    """A base model's head under LoRA, or hidden states that are given."""
    hidden, weight, targets = data()
    _, grad_hidden, grad_weight = expected(hidden, weight, targets)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    projected_cross_entropy(hidden, weight, targets).backward()
    other, grad = (weight, grad_weight) if frozen == "hidden" else (hidden, grad_hidden)
    torch.testing.assert_close(other.grad, grad, rtol=0, atol=1e-12)


def test_bf16_activations_float32_weights():
    """The way it runs under autocast: the weight's gradient comes back in float32."""
    hidden, weight, targets = data(torch.bfloat16, n=300, h=64, v=500)
    weight = weight.detach().float().requires_grad_()
    with torch.no_grad():
        weight *= 0.3
    loss, grad_hidden, grad_weight = value_and_gradients(hidden, weight, targets, 4)
    assert (loss.dtype, grad_hidden.dtype, grad_weight.dtype) == (
        torch.float32,
        torch.bfloat16,
        torch.float32,
    )
    exact = expected(
        hidden.detach().double().requires_grad_(),
        weight.detach().double().requires_grad_(),
        targets,
    )
    for mine, theirs in zip((loss, grad_hidden, grad_weight), exact, strict=True):
        error = (mine.double() - theirs).norm() / theirs.norm()
        assert error < 0.005  # bf16 sums over the 75 chunks would reach 0.007


class LargestTensor(TorchDispatchMode):
    """Notes the most elements that any operation's result held."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.itemsize)
        return out


def test_the_logits_of_all_tokens_never_exist_at_once():
    n, v, chunk = 1000, 200, 50
    hidden, weight, targets = data(torch.float32, n=n, h=H, v=v)
    with LargestTensor() as usual:
        expected(hidden, weight, targets)
    assert usual.elements == n * v  # the probe sees them where they do exist
    with LargestTensor() as ours:
        projected_cross_entropy(hidden, weight, targets, chunk).backward()
    assert ours.elements == chunk * v


def test_memory_kept_for_backward():
    n, v = 1000, 200
    hidden, weight, targets = data(torch.float32, n=n, h=H, v=v)
    loss = projected_cross_entropy(hidden, weight, targets)
    kept = sum(tensor.numel() for tensor in loss.grad_fn.saved_tensors)
    assert kept == n * H + v * H + n  # both gradients, and which tokens count


def test_one_product_without_gradients():
    weight = torch.nn.Parameter(torch.randn(11, 8))
    with torch.no_grad(), CountOps() as count:
        projected_cross_entropy(torch.randn(5, 8), weight, torch.zeros(5, dtype=torch.int64))
    assert count.products == 1


@pytest.mark.parametrize("valid", [600, 786, 2048])
def test_division_by_targets_is_float32(valid: int):
    """Else all gradients but the head's would be scaled by up to 0.2%."""
    torch.manual_seed(0)
    hidden = torch.randn(64, 32).bfloat16().requires_grad_()
    weight = torch.randn(50, 32).bfloat16()
    targets = torch.randint(50, (64,))
    (projected_cross_entropy(hidden, weight, targets, 16) / valid).backward()
    exact = hidden.detach().double().requires_grad_()
    logits = exact @ weight.double().T
    (torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / valid).backward()
    assert hidden.grad is not None
    ratio = (hidden.grad.double() * exact.grad).sum() / exact.grad.square().sum()
    assert abs(ratio - 1) < 4e-4


def hard_logits(dtype):
    """Ordinary rows, and rows whose target is certain, far away, or as likely as all others."""
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(40, 130, generator=generator, dtype=torch.float64)
    targets = torch.randint(130, (40,), generator=generator)
    logits[0], logits[0, targets[0]] = 0.0, 90.0
    logits[1], logits[1, targets[1]] = 0.0, -1e4
    logits[2] = 3e4
    logits[3] *= 1e3
    return logits.to(dtype), targets


def exact_loss_and_gradient(logits, targets):
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), logits)[0]


def check_kernel(kernel, dtype):
    logits, targets = hard_logits(dtype)
    losses, gradient = kernel(logits.clone(), targets)
    exact_losses, exact_gradient = exact_loss_and_gradient(logits, targets)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.dtype == dtype
    relative = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    small = 1e-13 if dtype == torch.float64 else 2e-7  # of a loss and a gradient that are nearly 0
    torch.testing.assert_close(losses.double(), exact_losses, rtol=min(relative, 1e-6), atol=small)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=relative, atol=small)


@pytest.mark.parametrize("kernel", [eager_loss_and_gradient, fused_loss_and_gradient])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_kernels_against_float64(kernel, dtype):
    check_kernel(kernel, dtype)


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs g++")
def test_the_compiled_kernel_against_float64():
    check_kernel(torch.compile(fused_loss_and_gradient, dynamic=False), torch.bfloat16)


@pytest.mark.parametrize("chunk_tokens", [None, 5])
def test_the_fused_kernel_serves_the_whole_function(chunk_tokens):
    """With tokens that are left out, and a last chunk that is shorter."""
    hidden, weight, targets = data()
    loss = projected_cross_entropy(hidden, weight, targets, chunk_tokens, fused_loss_and_gradient)
    ours = loss.detach(), *torch.autograd.grad(loss, (hidden, weight))
    for mine, theirs in zip(ours, expected(*data()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
