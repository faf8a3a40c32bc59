"""Strategies for several ranks: replicated (DDP) or sharded (FSDP2, HSDP).

The model's code knows nothing of them. DDP (Li et al. 2020) wraps the model and averages whole
gradients. FSDP2 (Zhao et al. 2023) replaces each parameter by a shard and gathers a block's
parameters when the block runs. ``zero2`` keeps them gathered until the backward pass (ZeRO stage 2,
Rajbhandari et al. 2020). ``hsdp`` shards within groups of ranks and replicates across groups.
"""

import contextlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from minigpt_cli.core.errors import UserError
from minigpt_cli.distributed.device import device_memory
from minigpt_cli.distributed.world import World

BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments, in float32
BYTES_PER_FROZEN = 4


@dataclass(frozen=True)
class ParallelDims:
    """A strategy, checked against the number of ranks, and its device mesh."""

    strategy: str  # single, ddp, zero2, fsdp or hsdp
    world: World
    mesh: DeviceMesh | None = None  # of the sharded strategies
    whole_gradients: bool = False  # sharded: micro-batches add up whole ones; see gradient_sync

    def global_norm(self, grads: list[Tensor]) -> Tensor:
        """Compute the Euclidean norm of the whole gradient, the same on every rank.

        Args:
            grads: this rank's part of the averaged gradients; see ``to_local``.
        """
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        if self.mesh is None:
            return norm
        squares = norm.square()
        # Replicas hold the same shards: add up those of one group only.
        shards = self.mesh["shard"] if self.strategy == "hsdp" else self.mesh
        dist.all_reduce(squares, group=shards.get_group())
        return squares.sqrt()


def training_state_bytes(whole: int, trained: int) -> int:
    """Return the bytes of weights, gradients and moments on one device.

    Args:
        whole: number of parameters.
        trained: how many of them are trained.
    """
    return BYTES_PER_PARAMETER * trained + BYTES_PER_FROZEN * (whole - trained)


def auto_strategy(state_bytes: int, memory: int) -> Literal["ddp", "fsdp"]:
    """Return what ``auto`` means for a training state and a rank's memory, both in bytes."""
    return "ddp" if state_bytes <= 0.4 * memory else "fsdp"


def holds_whole_gradients(gradient_bytes: int, memory: int) -> bool:
    """Return whether micro-batches add up whole gradients, which are scattered at the last one.

    It saves the communication of the others, and costs memory.

    Args:
        gradient_bytes: of the whole gradients.
        memory: of a rank.
    """
    return gradient_bytes < 0.1 * memory


def choose_parallel_dims(
    world: World, strategy: str, shard_size: int | None, state_bytes: int, gradient_bytes: int
) -> ParallelDims:
    """Choose the strategy and mesh for a recipe's ``[distributed]`` on these ranks.

    ``auto`` is ddp if the training state takes at most 40% of a rank's memory, else fsdp. A single
    process has no strategy.

    Args:
        state_bytes: size of the whole training state.
        gradient_bytes: size of the whole gradients.

    Raises:
        UserError: ``shard_size`` doesn't divide the number of ranks.
    """
    if world.size == 1:
        return ParallelDims("single", world)
    memory = device_memory(world.device, world.local_size)
    too_large, scatters = world.all_reduce_max(
        auto_strategy(state_bytes, memory) != "ddp",
        not holds_whole_gradients(gradient_bytes, memory),
    )
    if strategy == "auto":
        strategy = "fsdp" if too_large else "ddp"
    if strategy == "ddp":
        return ParallelDims("ddp", world)
    kind = world.device.type
    if strategy == "hsdp":
        size = shard_size or world.local_size
        if world.size % size:
            raise UserError(
                f"[distributed] shard_size {size} does not divide the {world.size} ranks"
            )
        shape = (world.size // size, size)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",))
    return ParallelDims(strategy, world, mesh, not scatters)


def apply_fsdp(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    ends: tuple[nn.Module, nn.Module] | None,
    dims: ParallelDims,
    dtype: torch.dtype,
) -> None:
    """Shard a model on the meta device in place, if the strategy is a sharded one.

    Args:
        blocks: modules whose parameters are gathered together while they run.
        ends: the embedding and the output projection, where they share no weight: gathered while
            they run. All other parameters stay gathered from the forward to the backward pass.
        dtype: of matrix products. With bf16 or fp16 the blocks' parameters are gathered in it;
            gradients are reduced in float32.
    """
    if dims.mesh is None:
        return
    half = dtype in (torch.bfloat16, torch.float16)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,  # the residual stream stays in float32
    )
    keep = dims.strategy == "zero2"
    for block in blocks:
        fully_shard(block, mesh=dims.mesh, mp_policy=policy, reshard_after_forward=not keep)
    # Embeddings in bf16 would move the loss by 1e-3 within 50 steps (benchmarks/LOG.md).
    if ends is not None:
        embedding, head = ends
        fully_shard(embedding, mesh=dims.mesh, reshard_after_forward=True)
        embedding.set_unshard_in_backward(False)  # type: ignore[operator]  # only rows are added to
        # The backward pass begins with the head.
        fully_shard(head, mesh=dims.mesh, reshard_after_forward=False)
    fully_shard(model, mesh=dims.mesh, reshard_after_forward=False)


def apply_ddp(model: nn.Module, dims: ParallelDims) -> nn.Module:
    """Return the module to call in training: the DDP wrapper for ddp, else the model."""
    if dims.strategy != "ddp":
        return model
    device = dims.world.device
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        init_sync=False,  # every rank draws or loads the same weights
        gradient_as_bucket_view=True,
    )


def gradient_sync(
    forward: nn.Module, dims: ParallelDims, last: bool
) -> AbstractContextManager[None]:
    """Return the context for one micro-batch.

    With DDP, and where whole gradients fit, only the last micro-batch reduces them. Elsewhere each
    one scatters them over the shards, and the last one sums them over hsdp's groups.
    """
    if isinstance(forward, DistributedDataParallel) and not last:
        return forward.no_sync()
    if isinstance(forward, FSDPModule):
        scatters = last or not dims.whole_gradients
        forward.set_requires_gradient_sync(scatters)
        forward.set_requires_all_reduce(last)
        forward.set_is_last_backward(scatters)  # frees what was sent
    return contextlib.nullcontext()


def zero_grad(model: nn.Module, dims: ParallelDims) -> None:
    """Clear the gradients. DDP's must remain views of its buckets, so they are set to zero."""
    model.zero_grad(set_to_none=dims.strategy != "ddp")


def to_local(tensors: list[Tensor]) -> list[Tensor]:
    """Return this rank's part of each tensor, without a copy."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def num_shards(parameter: Tensor) -> int:
    """Return the number of ranks that share the parameter's rows."""
    if not isinstance(parameter, DTensor):
        return 1
    return parameter.device_mesh.size(parameter.device_mesh.ndim - 1)


@torch.no_grad()
def fill_own_rows(parameter: Tensor, rows: Callable[[int, int], Tensor]) -> None:
    """Fill a parameter, sharded or not; nothing is sent.

    Args:
        rows: returns the rows from its first argument to its second (exclusive) of the whole
            parameter. It is asked for those that this rank holds.
    """
    begin, (own,) = 0, to_local([parameter])
    if isinstance(parameter, DTensor):
        chunk = -(-len(parameter) // num_shards(parameter))  # FSDP2 splits as torch.chunk does
        shard = parameter.device_mesh.get_local_rank(parameter.device_mesh.ndim - 1)
        begin = min(shard * chunk, len(parameter))
    own.copy_(rows(begin, begin + len(own)))


def copy_full_tensor(parameter: Tensor, values: Tensor) -> None:
    """Fill a parameter, sharded or not, from its full values."""
    fill_own_rows(parameter, lambda begin, end: values[begin:end])


def over_whole_matrices(
    function: Callable[[Tensor], Tensor], parameters: list[Tensor], parts: Tensor
) -> Tensor:
    """Apply ``function`` to whole matrices of which each rank holds some rows.

    Each rank gets an equal number of whole matrices and sends the results back: two collectives
    in all, and no matrix is computed twice in a group of shards.

    Args:
        function: (k, rows, columns) -> the same shape.
        parameters: n parameters of one shape.
        parts: (n, this rank's rows, columns), their local parts.

    Returns:
        This rank's rows of the results, shaped as ``parts``.
    """
    first = parameters[0]
    if not isinstance(first, DTensor):
        return function(parts)
    group = first.device_mesh.get_group(first.device_mesh.ndim - 1)
    ranks, (count, own, columns) = num_shards(first), parts.shape
    rows = first.shape[0]
    chunk = -(-rows // ranks)  # rows of a shard: FSDP2 splits as torch.chunk does
    share = -(-count // ranks)  # matrices of a rank
    sent = parts.new_zeros(ranks * share, chunk, columns)
    sent[:count, :own] = parts
    got = torch.empty_like(sent)  # from each rank its rows of my matrices
    dist.all_to_all_single(got, sent, group=group)
    whole = got.view(ranks, share, chunk, columns).transpose(0, 1)
    done = function(whole.reshape(share, ranks * chunk, columns)[:, :rows])
    padded = torch.nn.functional.pad(done, (0, 0, 0, ranks * chunk - rows))
    back = padded.view(share, ranks, chunk, columns).transpose(0, 1).contiguous()
    dist.all_to_all_single(got, back, group=group)
    return got.view(ranks * share, chunk, columns)[:count, :own]
