"""The factor of the gradients inside the optimizers' kernels, against torch's plain optimizers."""

import copy

import pytest
import torch

from minigpt_cli.train.optimizer import update_weights
from minigpt_cli.train.step import train_step
from tests.helpers.steps import batch, tiny_context

LR, DECAY, CLIP = 1e-2, 0.1, 0.3  # LR, DECAY: of tiny_context


def plain_optimizers(model: torch.nn.Module, name: str) -> list[torch.optim.Optimizer]:
    """torch's optimizers as they come, one tensor at a time."""
    named = list(model.named_parameters())
    inside = [p for n, p in named if n.startswith("layers.") and p.ndim == 2]
    matrices = inside if name == "muon" else [p for _, p in named if p.ndim == 2]
    rest = [p for _, p in named if not any(p is each for each in matrices)]
    adamw = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-8, "foreach": False, "fused": False}
    others = torch.optim.AdamW(rest, weight_decay=0.0, **adamw)
    if name == "muon":
        muon = torch.optim.Muon(matrices, lr=LR, weight_decay=DECAY, momentum=0.95)
        return [muon, others]
    return [torch.optim.AdamW(matrices, weight_decay=DECAY, **adamw), others]


def states(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> list[dict]:
    """Each parameter's momenta and step count, in the model's order."""
    return [
        next(each.state[p] for each in optimizers if p in each.state) for p in model.parameters()
    ]


def check_equal(
    model: torch.nn.Module,
    optimizers: list[torch.optim.Optimizer],
    plain: torch.nn.Module,
    plain_ones: list[torch.optim.Optimizer],
    steps: int,
    moments: float,
) -> None:
    """Compare moments and weights; with Muon only roughly, since it computes changes in bf16.

    Args:
        steps: how many changed the weights.
        moments: the largest relative difference of moments.
    """
    pairs = zip(states(model, optimizers), states(plain, plain_ones), strict=True)
    for mine, theirs in pairs:
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert (mine[key] - theirs[key]).norm() <= moments * theirs[key].norm()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        difference = (p.detach() - q.detach()).norm() / (LR * steps * p.numel() ** 0.5)
        assert difference < (5e-3 if len(optimizers) > 1 else 1e-4), name


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_factor_of_the_gradients(name: str):
    """It differs from step to step: a constant one would hardly change a weight."""
    t = tiny_context(torch.float32, name=name)
    plain = copy.deepcopy(t.model)
    plain_ones = plain_optimizers(plain, name)
    factors = (4.0, 0.3, 50.0, 1e-3, 1.0)
    for step, factor in enumerate(factors):
        skip = step == 2
        torch.manual_seed(step)
        for p, q in zip(t.model.parameters(), plain.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad * factor
        before = copy.deepcopy(states(t.model, t.optimizers))
        update_weights(t.optimizers, 1.0, torch.tensor(float(skip)), torch.tensor(factor))
        if skip:
            after = states(t.model, t.optimizers)
            for mine, theirs in zip(after, before, strict=True):
                assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
        else:
            for each in plain_ones:
                each.step()
    check_equal(t.model, t.optimizers, plain, plain_ones, len(factors), 1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_clipped_steps(name: str):
    """In float32, where AdamW's kernel applies the factor; the step whose gradient is NaN is
    skipped."""
    t = tiny_context(torch.float32, name=name, clip=CLIP)
    plain = copy.deepcopy(t.model)
    plain_ones = plain_optimizers(plain, name)
    steps, shrinks = 5, []
    for step in range(steps):
        inputs, targets, *_ = batch(step)
        if step == 2:
            hook = t.model.norm.weight.register_hook(lambda grad: grad * torch.nan)
            assert train_step(t, batch(step), step, 1.0)[1].isnan()
            hook.remove()
            continue
        plain.zero_grad()
        (plain(inputs, targets) / targets.numel()).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
        for each in plain_ones:
            each.step()
        _, grad_norm = train_step(t, batch(step), step, 1.0)
        assert grad_norm.item() == pytest.approx(norm.item(), rel=0.01 if name == "muon" else 1e-4)
        shrinks.append(CLIP / norm.item())
    assert max(shrinks) < 0.5  # else clipping is not tested
    moments = 0.02 if name == "muon" else 1e-4  # Muon's rounded weights give other gradients
    check_equal(t.model, t.optimizers, plain, plain_ones, steps, moments)
