"""AdamW, or Muon for the hidden matrices and AdamW for the rest; updates that can be skipped."""

import torch
from torch import Tensor
from torch.optim import AdamW

from minigpt_cli.distributed.parallel import to_local
from minigpt_cli.model.gpt import GPT
from minigpt_cli.recipe import OptimizerSettings
from minigpt_cli.train.muon import Muon


def build_optimizers(model: GPT, settings: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """Build the optimizers of a model's trainable parameters, their state all zeros.

    AdamW (Loshchilov and Hutter 2019) decays matrices and embeddings, not biases and norms. Muon
    (Jordan et al. 2024) takes the matrices inside the blocks and decays them; the embeddings and
    the output projection are then left to AdamW, without decay.

    Args:
        model: the model, sharded or not.
        settings: the recipe's ``[optimizer]``.

    Returns:
        [AdamW], [Muon, AdamW] or, if all parameters are Muon's, [Muon]. Each parameter group has a
        ``peak_lr``, which ``update_weights`` scales.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizers: list[torch.optim.Optimizer] = []
    if settings.name == "muon":
        hidden = [p for name, p in trainable if name.startswith("layers.") and p.ndim == 2]
        trainable = [(n, p) for n, p in trainable if not (n.startswith("layers.") and p.ndim == 2)]
        peak_lr = muon_peak_lr(settings)
        muon = Muon(
            hidden, lr=peak_lr, weight_decay=settings.weight_decay, momentum=settings.muon_momentum
        )
        muon.param_groups[0]["peak_lr"] = peak_lr
        optimizers.append(muon)
        if not trainable:  # LoRA: all adapters are matrices
            return optimizers
    decay = 0.0 if optimizers else settings.weight_decay
    groups = [
        {"params": [p for _, p in trainable if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for _, p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = AdamW(
        [group | {"peak_lr": settings.lr} for group in groups if group["params"]],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,  # only the fused kernel can skip an update on the device (found_inf)
    )
    # Otherwise DCP creates the state by a step with zero gradients, which AdamW would count.
    for _, p in trainable:
        adamw.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return [*optimizers, adamw]


def muon_peak_lr(settings: OptimizerSettings) -> float:
    """Return the peak learning rate of the matrices that Muon updates."""
    return settings.muon_lr or settings.lr


@torch.no_grad()
def update_weights(
    optimizers: list[torch.optim.Optimizer],
    lr_factor: float,
    skip_update: Tensor,
    grad_factor: Tensor,
) -> None:
    """Update all weights and moments, or none at all if ``skip_update`` is 1.

    The decision stays on the device: nothing here waits for it.

    Args:
        optimizers: as ``build_optimizers`` made them; the gradients are in place.
        lr_factor: the factor that scales each group's peak learning rate.
        skip_update: float32 scalar on the device, 0.0 or 1.0.
        grad_factor: scalar on the device; the gradients are multiplied by it.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        if isinstance(optimizer, Muon):
            optimizer.skip_update, optimizer.grad_factor = skip_update, grad_factor
        else:
            # The fused kernel then leaves weights, moments and step count, as under GradScaler,
            # and divides the gradients by grad_scale in its own pass.
            optimizer.found_inf = skip_update  # type: ignore[attr-defined]
            optimizer.grad_scale = _grad_scale(optimizer, grad_factor)  # type: ignore[attr-defined]
        optimizer.step()


def _grad_scale(optimizer: torch.optim.Optimizer, grad_factor: Tensor) -> Tensor | None:
    """Return what AdamW's fused kernel divides by: a float32. A float64 factor is applied here."""
    if grad_factor.dtype == torch.float32:
        return grad_factor.reciprocal()
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    torch._foreach_mul_(to_local([grad for grad in grads if grad is not None]), grad_factor)
    return None
