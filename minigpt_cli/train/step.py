"""One optimizer step: micro-batches, clipping, the update. Nothing waits for the device."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minigpt_cli.core.constants import IGNORE_INDEX
from minigpt_cli.core.seed import derived_seed
from minigpt_cli.data.loader import Batch
from minigpt_cli.distributed.parallel import ParallelDims, gradient_sync, to_local, zero_grad
from minigpt_cli.model import precision
from minigpt_cli.model.gpt import GPT
from minigpt_cli.train.guard import GuardState, watch_step
from minigpt_cli.train.optimizer import update_weights


@dataclass(frozen=True)
class StepContext:
    """The model, its optimizers and the settings of a step.

    Attributes:
        model: the plain model, perhaps sharded in place by FSDP2.
        forward: the module to call in training: the model, or DDP around it.
        parallel_dims: how the model is spread over the ranks.
        optimizers: AdamW, or Muon and AdamW.
        scaler: the loss scaler of fp16; disabled for other dtypes.
        guard: the record of bad steps on the device.
        dtype: the dtype of matrix products.
        seed: the run's seed, for dropout.
        micro_batch_size: sequences per forward pass of one rank.
        clip_norm: the largest gradient norm; 0 switches clipping off.
        dropout: whether the forward pass draws random numbers.
    """

    model: GPT
    forward: nn.Module
    parallel_dims: ParallelDims
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    guard: GuardState
    dtype: torch.dtype
    seed: int
    micro_batch_size: int
    clip_norm: float
    dropout: bool


def train_step(
    context: StepContext, batch: Batch, step: int, lr_factor: float
) -> tuple[Tensor, Tensor]:
    """Make one update from this batch.

    The loss is the sum of token losses over the number of valid targets in the whole batch. So it
    doesn't matter how the batch is cut into ranks and micro-batches.

    Args:
        context: the model and its optimizers, which change in place.
        batch: this rank's part of the global batch, on the device.
        step: updates made before this one.
        lr_factor: the factor that scales each peak learning rate.

    Returns:
        (loss, norm of the whole gradient before clipping): scalars on the device, float32 (float64
        under fp64), the same on every rank.
    """
    c, world = context, context.parallel_dims.world
    device = batch.inputs.device
    valid = world.all_reduce_sum((batch.targets != IGNORE_INDEX).sum())
    local_loss = torch.zeros((), device=device, dtype=precision.weights_dtype(c.dtype))
    micro_batches = list(batch.micro_batches(c.micro_batch_size))
    for index, arguments in enumerate(micro_batches):
        if c.dropout:
            global_index = world.rank * len(micro_batches) + index
            torch.manual_seed(dropout_seed(c.seed, step, global_index))
        with gradient_sync(c.forward, c.parallel_dims, last=index == len(micro_batches) - 1):
            with precision.autocast(c.dtype, device):
                part = c.forward(*arguments) / valid
            c.scaler.scale(part).backward()
        local_loss += part.detach()
    loss = world.all_reduce_sum(local_loss.clone())

    if c.scaler.is_enabled():
        for each in c.optimizers:
            c.scaler.unscale_(each)
    grads = to_local([p.grad for p in c.model.parameters() if p.grad is not None])
    # DDP and FSDP2 average over the ranks, but the sum is needed. The factor is applied in the pass
    # that updates: a loss scaled up instead would overflow earlier in fp16.
    grad_norm = c.parallel_dims.global_norm(grads) * world.size
    scale = c.scaler.scale(torch.ones_like(loss)) if c.scaler.is_enabled() else None
    skip_update = watch_step(c.guard, step + 1, loss, grad_norm, local_loss=local_loss, scale=scale)
    grad_factor = torch.full_like(grad_norm, world.size)
    if c.clip_norm:
        grad_factor *= torch.clamp(c.clip_norm / (grad_norm + 1e-6), max=1.0)
    update_weights(c.optimizers, lr_factor, skip_update, grad_factor)
    if c.scaler.is_enabled():
        c.scaler.update()
    zero_grad(c.model, c.parallel_dims)
    return loss, grad_norm


def dropout_seed(seed: int, step: int, index: int) -> int:
    """Return the seed of one micro-batch's dropout masks.

    Args:
        seed: the run's seed.
        step: updates made before this one.
        index: the micro-batch's index in the global batch, so that the number of ranks doesn't
            matter.
    """
    return derived_seed("dropout", seed, step, index)
