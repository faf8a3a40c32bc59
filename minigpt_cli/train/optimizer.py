"""AdamW, or Muon for the hidden matrices and AdamW for the rest; updates that can be called off."""

import torch
from torch import Tensor
from torch.optim import AdamW

from minigpt_cli.model.gpt import GPT
from minigpt_cli.recipe import OptimizerSettings
from minigpt_cli.train.muon import Muon


def build(model: GPT, recipe: OptimizerSettings) -> list[torch.optim.Optimizer]:
    """The optimizers of a run.

    AdamW (Loshchilov and Hutter 2019) decays matrices and embeddings, not biases and norms. Muon
    (Jordan et al. 2024), if asked for, takes the matrices inside the blocks, and decays them; the
    embeddings and the output projection are then left to AdamW, and not decayed. Each group's
    ``peak_lr`` is what the schedule scales. Their state is there from the beginning, all zeros.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizers: list[torch.optim.Optimizer] = []
    if recipe.name == "muon":
        hidden = [p for name, p in trainable if name.startswith("layers.") and p.ndim == 2]
        trainable = [(n, p) for n, p in trainable if not (n.startswith("layers.") and p.ndim == 2)]
        muon_lr = recipe.muon_lr or recipe.lr
        muon = Muon(
            hidden, lr=muon_lr, weight_decay=recipe.weight_decay, momentum=recipe.muon_momentum
        )
        muon.param_groups[0]["peak_lr"] = muon_lr
        optimizers.append(muon)
        if not trainable:  # adapters are matrices, all of them
            return optimizers
    decay = 0.0 if optimizers else recipe.weight_decay
    groups = [
        {"params": [p for _, p in trainable if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for _, p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = AdamW(
        [group | {"peak_lr": recipe.lr} for group in groups if group["params"]],
        lr=recipe.lr,
        betas=recipe.betas,
        eps=recipe.eps,
        fused=True,  # CPU and CUDA have it; it is also what makes an update that can be called off
    )
    # Else the checkpoint engine makes it by a step with gradients of 0, which AdamW would count.
    for _, p in trainable:
        adamw.state[p] = {
            "step": torch.zeros((), device=p.device),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
    return [*optimizers, adamw]


@torch.no_grad()
def update(optimizers: list[torch.optim.Optimizer], lr_factor: float, skip_update: Tensor) -> None:
    """One update of all weights and moments, or none at all where ``skip_update`` is 1.

    The decision stays on the device: nothing here waits for it.

    Args:
        lr_factor: the schedule's value, as a share of each group's peak learning rate.
        skip_update: float32 scalar on the device, 0.0 or 1.0.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * lr_factor
        if isinstance(optimizer, Muon):
            optimizer.skip_update = skip_update
        else:
            # The fused kernel leaves everything as it was, its step count too, as under GradScaler.
            optimizer.found_inf = skip_update  # type: ignore[attr-defined]
        optimizer.step()
