"""One optimizer step, against arithmetic done another way."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from minigpt_cli.data.loader import Batch
from minigpt_cli.recipe import GuardSettings
from minigpt_cli.train.guard import MAX_OVERFLOWS_IN_A_ROW, new_guard
from minigpt_cli.train.guard_report import divergence, read_guard
from minigpt_cli.train.muon import Muon
from minigpt_cli.train.step import dropout_seed, train_step
from tests.helpers.steps import CPU, batch, everything, tiny_context


def adamw_by_hand(before: Tensor, grad: Tensor, lr: float, decay: float) -> Tensor:
    """The first step of AdamW (Loshchilov and Hutter 2019, algorithm 2)."""
    m, v = 0.1 * grad, 0.05 * grad**2
    m_hat, v_hat = m / (1 - 0.9), v / (1 - 0.95)
    return before - lr * (m_hat / (v_hat.sqrt() + 1e-8) + decay * before)


def test_a_step_is_clipped_adamw():
    t = tiny_context(clip=0.3)
    reference = copy.deepcopy(t.model)
    inputs, targets, *_ = batch()
    logits = reference(inputs)
    mean = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    mean.backward()
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in reference.parameters()))
    assert norm > 0.3  # else clipping is not tested

    loss, grad_norm = train_step(t, Batch(inputs, targets, None), step=0, lr_factor=0.5)
    assert loss.item() == pytest.approx(mean.item(), rel=1e-12)
    assert grad_norm.item() == pytest.approx(norm, rel=1e-12)
    for (name, p), q in zip(t.model.named_parameters(), reference.parameters(), strict=True):
        grad = q.grad * 0.3 / (norm + 1e-6)
        expected = adamw_by_hand(q.detach(), grad, 0.5e-2, 0.1 if q.ndim == 2 else 0.0)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12, msg=name)
        assert p.grad is None


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_equals_the_whole_batch(micro: int):
    whole, parts = tiny_context(), tiny_context(micro=micro)
    inputs, targets, *_ = batch()
    targets = targets.clone()
    targets[:3, 4:] = -100  # micro-batches with unequal numbers of valid targets
    for step in range(3):
        a = train_step(whole, Batch(inputs, targets, None), step, 1.0)
        b = train_step(parts, Batch(inputs, targets, None), step, 1.0)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    for p, q in zip(everything(whole), everything(parts), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_parameter_groups():
    t = tiny_context(name="muon")
    muon, adamw = t.optimizers
    names = {id(p): name for name, p in t.model.named_parameters()}
    hidden = {names[id(p)] for p in muon.param_groups[0]["params"]}
    assert hidden == {
        name for name, p in t.model.named_parameters() if name.startswith("layers.") and p.ndim == 2
    }
    decayed, kept = adamw.param_groups
    assert {names[id(p)] for p in decayed["params"]} == {"embed_tokens.weight", "lm_head.weight"}
    assert muon.param_groups[0]["weight_decay"] == 0.1
    assert decayed["weight_decay"] == kept["weight_decay"] == 0.0
    with_adamw = tiny_context().optimizers[0].param_groups
    assert [group["weight_decay"] for group in with_adamw] == [0.1, 0.0]
    assert all(p.ndim == 2 for p in with_adamw[0]["params"])
    assert all("norm" in names[id(p)] for p in kept["params"])
    everywhere = [id(p) for each in t.optimizers for g in each.param_groups for p in g["params"]]
    assert sorted(everywhere) == sorted(names)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_step_changes_nothing_and_ends_the_run(name: str, after: int, poison: float):
    t = tiny_context(torch.float32, name=name)
    for step in range(after):
        train_step(t, batch(step), step, 1.0)
    before = everything(t)
    weight = t.model.layers[0].mlp.up_proj.weight
    hook = weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), poison))
    loss, norm = train_step(t, batch(9), after, 1.0)
    hook.remove()
    assert loss.isfinite()
    assert not norm.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(t), strict=False))
    fresh = everything(t)[len(before) :]  # moments made by this very step
    assert not any(value.any() for value in fresh)
    message = str(divergence(read_guard(t.guard), "The last good one is X."))
    assert f"not finite at step {after + 1};" in message
    assert "The last good one is X." in message

    train_step(t, batch(after), after, 1.0)  # and the next good one is as if nothing had been
    other = tiny_context(torch.float32, name=name)
    for step in range(after + 1):
        train_step(other, batch(step), step, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(everything(t), everything(other), strict=True))


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_fp16_overflow(name: str):
    overflowing = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    t = replace(tiny_context(torch.float16, name=name), scaler=overflowing)
    before = everything(t)
    scales = []
    while not train_step(t, batch(), 0, 1.0)[1].isfinite():
        assert all(torch.equal(a, b) for a, b in zip(before, everything(t), strict=False))
        scales.append(t.scaler.get_scale())
    assert scales[:3] == [2.0**39, 2.0**38, 2.0**37]
    assert not all(torch.equal(a, b) for a, b in zip(before, everything(t), strict=False))
    assert t.guard.overflows.item() == len(scales)
    assert not read_guard(t.guard).bad  # skipping is no divergence


def test_fp16_gradients_are_unscaled_before_clipping():
    half, full = tiny_context(torch.float16), tiny_context(torch.float32)
    (loss, norm), (loss32, norm32) = (train_step(t, batch(), 0, 1.0) for t in (half, full))
    assert loss.item() == pytest.approx(loss32.item(), rel=1e-3)
    assert norm.item() == pytest.approx(norm32.item(), rel=1e-2)


def test_nonfinite_loss_ends_fp16_run():
    t = tiny_context(torch.float16)
    with torch.no_grad():
        t.model.norm.weight.fill_(math.nan)
    train_step(t, batch(), 0, 1.0)
    assert read_guard(t.guard).bad


def test_dropout_depends_on_step_and_place_only():
    one, other = tiny_context(dropout=0.5, micro=4), tiny_context(dropout=0.5, micro=4)
    torch.manual_seed(1)
    a, _ = train_step(one, batch(), 7, 1.0)
    torch.manual_seed(2)
    b, _ = train_step(other, batch(), 7, 1.0)
    c, _ = train_step(tiny_context(dropout=0.5, micro=4), batch(), 8, 1.0)
    assert a == b
    assert a != c
    assert len({dropout_seed(1, step, index) for step in range(9) for index in range(9)}) == 81


def test_no_step_waits_for_the_device():
    """Nothing in a step reads a tensor's value: on a GPU that would stall the queue."""

    class NoReading(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func not in (
                torch.ops.aten._local_scalar_dense.default,
                torch.ops.aten.nonzero.default,
            ), func
            return func(*args, **(kwargs or {}))

    for name, dtype in itertools.product(("adamw", "muon"), (torch.bfloat16, torch.float16)):
        watching = new_guard(CPU, GuardSettings(spike_sigma=1e-3, spike_window=8))
        for t in (
            tiny_context(dtype, name=name),
            replace(tiny_context(dtype, name=name), guard=watching),
        ):
            train_step(t, batch(), 0, 1.0)
            with NoReading():
                for step in range(1, 12):  # and none that is called off, or after a rollback is due
                    train_step(t, batch(), step, 1.0)
        assert read_guard(watching).rollback_at


def test_endless_fp16_overflows():
    t = tiny_context(torch.float16)
    t.model.norm.weight.register_hook(lambda grad: grad * math.nan)
    for step in range(MAX_OVERFLOWS_IN_A_ROW):
        assert not read_guard(t.guard).bad
        train_step(t, batch(), step, 1.0)
    assert read_guard(t.guard).bad


def test_muon_is_torchs_muon():
    """Batched, in place, with an update that can be called off: the same updates all the same."""
    torch.manual_seed(5)
    shapes = [(24, 24), (24, 24), (64, 24), (24, 64), (8, 24)]
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    settings = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    one, other = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        one.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)
