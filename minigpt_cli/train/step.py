"""One optimizer step: micro-batches, clipping, the update. Nothing waits for the device."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minigpt_cli.data.batches import Batch
from minigpt_cli.distributed.parallel import Layout, clear_gradients, gradient_sync, local
from minigpt_cli.model.cross_entropy import IGNORE
from minigpt_cli.model.gpt import GPT
from minigpt_cli.train import guard, optimizer, precision
from minigpt_cli.train.guard import Guard


@dataclass(frozen=True)
class Trainer:
    """What a step works on."""

    model: GPT
    forward: nn.Module  # what to call in training: the model, or DDP around it
    layout: Layout
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    guard: Guard
    dtype: torch.dtype
    seed: int
    micro_batch_size: int
    clip_norm: float
    dropout: bool  # whether the forward pass draws random numbers


def train_step(trainer: Trainer, batch: Batch, step: int, lr_share: float) -> tuple[Tensor, Tensor]:
    """One update from this batch.

    The loss is the sum of token losses over the number of valid targets in the whole batch, so it
    doesn't matter how the batch is cut into ranks and micro-batches.

    Args:
        batch: this rank's share of it, on the device.
        step: updates made before this one.
        lr_share: the schedule's value, as a share of the peak learning rate.

    Returns:
        (loss, norm of the whole gradient before clipping), float32 scalars on the device, the same
        on every rank.
    """
    t, world = trainer, trainer.layout.world
    device = batch.inputs.device
    valid = world.all_reduce_sum((batch.targets != IGNORE).sum())
    loss = torch.zeros((), device=device, dtype=precision.weights_dtype(t.dtype))
    parts = [p.split(t.micro_batch_size) for p in batch if p is not None]
    micro_batches = list(zip(*parts, strict=True))
    for index, (x, y, *segments) in enumerate(micro_batches):
        if t.dropout:
            place = world.rank * len(micro_batches) + index  # in the global batch
            torch.manual_seed(dropout_seed(t.seed, step, place))
        with gradient_sync(t.forward, last=index == len(micro_batches) - 1):
            with precision.autocast(t.dtype, device):
                part = t.forward(x, y, *segments) / valid
            t.scaler.scale(part).backward()
        loss += part.detach()
    share, loss = loss, world.all_reduce_sum(loss.clone())

    if t.scaler.is_enabled():
        for each in t.optimizers:
            t.scaler.unscale_(each)
    grads = local([p.grad for p in t.model.parameters() if p.grad is not None])
    # Averaged over the ranks, where the sum is wanted: put right in the pass that clips. (A loss
    # made larger instead would overflow earlier in fp16.)
    grad_norm = t.layout.global_norm(grads) * world.size
    scale = t.scaler.scale(torch.ones_like(loss)) if t.scaler.is_enabled() else None
    call_off = guard.watch(t.guard, step + 1, loss, grad_norm, local_loss=share, scale=scale)
    if t.clip_norm:
        shrink = torch.clamp(t.clip_norm / (grad_norm + 1e-6), max=1.0)
        torch._foreach_mul_(grads, shrink * world.size)
    elif world.size > 1:
        torch._foreach_mul_(grads, world.size)
    optimizer.update(t.optimizers, lr_share, call_off)
    if t.scaler.is_enabled():
        t.scaler.update()
    clear_gradients(t.model, t.layout)
    return loss, grad_norm


def dropout_seed(seed: int, step: int, index: int) -> int:
    """The seed of one micro-batch's dropout, by its place in the global batch: the same masks
    however many devices share the work."""
    digest = hashlib.sha256(f"dropout:{seed}:{step}:{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
