"""How a model is spread over ranks: not at all, replicated (DDP) or sharded (FSDP2, HSDP).

The model stays plain. DDP (Li et al. 2020) wraps it and averages whole gradients. FSDP2 (Zhao et
al. 2023) replaces each parameter by a shard of itself and gathers a block's parameters when the
block runs; ``zero2`` keeps them gathered until the backward pass is through (as in ZeRO stage 2,
Rajbhandari et al. 2020), ``hsdp`` shards within groups of ranks and replicates across groups.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from minigpt_cli.distributed.device import memory
from minigpt_cli.distributed.world import World
from minigpt_cli.errors import UserError

BYTES_PER_PARAMETER = 16  # weight, gradient and AdamW's two moments, in float32
BYTES_PER_FROZEN = 4


@dataclass(frozen=True)
class Layout:
    """A strategy that fits the ranks."""

    strategy: str  # single, ddp, zero2, fsdp or hsdp
    world: World
    mesh: DeviceMesh | None = None  # of the sharded strategies

    def global_norm(self, grads: list[Tensor]) -> Tensor:
        """The Euclidean norm of the whole gradient, the same on every rank.

        Args:
            grads: this rank's part, after the gradients were averaged; see ``local``.
        """
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        if self.mesh is None:
            return norm
        squares = norm.square()
        # Across replicas the shards are the same, so only those of one group are added up.
        shards = self.mesh["shard"] if self.strategy == "hsdp" else self.mesh
        dist.all_reduce(squares, group=shards.get_group())
        return squares.sqrt()


def choose_layout(world: World, strategy: str, shard_size: int | None, state_bytes: int) -> Layout:
    """The layout that a recipe's ``[distributed]`` means on these ranks.

    ``auto`` replicates a model whose training state takes up to 40% of a rank's memory, and shards
    a larger one. In a single process nothing is spread.

    Args:
        state_bytes: of the whole training state.

    Raises:
        UserError: ``shard_size`` doesn't divide the ranks.
    """
    if world.size == 1:
        return Layout("single", world)
    if strategy == "auto":
        fits = state_bytes <= 0.4 * memory(world.device, world.local_size)
        strategy = "fsdp" if any(world.all_reduce_max(not fits)) else "ddp"  # also for the smallest
    if strategy == "ddp":
        return Layout("ddp", world)
    kind = world.device.type
    if strategy == "hsdp":
        size = shard_size or world.local_size
        if world.size % size:
            raise UserError(
                f"[distributed] shard_size {size} does not divide the {world.size} ranks"
            )
        shape = (world.size // size, size)
        return Layout(
            "hsdp", world, init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
        )
    return Layout(strategy, world, init_device_mesh(kind, (world.size,), mesh_dim_names=("shard",)))


def spread(model: nn.Module, blocks: nn.ModuleList, layout: Layout, dtype: torch.dtype) -> None:
    """Shard a model on the meta device, in place, where the layout asks for it.

    Args:
        blocks: the parts whose parameters are gathered together.
        dtype: what matrix products are computed in. The blocks' parameters travel in bf16 or fp16,
            their gradients in float32.
    """
    if layout.mesh is None:
        return
    half = dtype in (torch.bfloat16, torch.float16)
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,  # the residual stream stays in float32
    )
    keep = layout.strategy == "zero2"
    for block in blocks:
        fully_shard(block, mesh=layout.mesh, mp_policy=policy, reshard_after_forward=not keep)
    # Embeddings in bf16 would move the loss by 1e-3 within 50 steps (benchmarks/LOG.md).
    fully_shard(model, mesh=layout.mesh, reshard_after_forward=False)


def replicate(model: nn.Module, layout: Layout) -> nn.Module:
    """What to call for training: under DDP its wrapper, else the model itself."""
    if layout.strategy != "ddp":
        return model
    device = layout.world.device
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        init_sync=False,  # every rank draws or loads the same weights
        gradient_as_bucket_view=True,
    )


def gradient_sync(forward: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around a micro-batch's forward and backward pass: only the last one's gradients travel."""
    if isinstance(forward, DistributedDataParallel) and not last:
        return forward.no_sync()
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(last)
        forward.set_is_last_backward(last)
    return contextlib.nullcontext()


def clear_gradients(model: nn.Module, layout: Layout) -> None:
    """Before the next step. DDP's gradients stay what they are, views of the buckets that travel:
    new ones would be summed beside these."""
    model.zero_grad(set_to_none=layout.strategy != "ddp")


def local(tensors: list[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, sharing its memory."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def shards(parameter: Tensor) -> int:
    """Over how many ranks its rows are spread."""
    if not isinstance(parameter, DTensor):
        return 1
    return parameter.device_mesh.size(parameter.device_mesh.ndim - 1)


@torch.no_grad()
def assign(parameter: Tensor, values: Tensor) -> None:
    """Fill a parameter, sharded or not, from the whole of its values."""
    if isinstance(parameter, DTensor):
        # Every rank has the same values and cuts out its shard: nothing is sent.
        values = distribute_tensor(
            values.to(parameter.device), parameter.device_mesh, parameter.placements,
            src_data_rank=None,
        )  # fmt: skip
    parameter.copy_(values)


def over_whole_matrices(
    function: Callable[[Tensor], Tensor], parameters: list[Tensor], parts: Tensor
) -> Tensor:
    """What ``function`` makes of whole matrices, where each rank holds some rows of each.

    Each rank is sent its share of the matrices whole and sends the results back: two collectives
    for all of them, and no matrix is worked on twice within a group of shards.

    Args:
        function: (k, rows, columns) -> the same shape.
        parameters: the n parameters of one shape that the parts belong to.
        parts: (n, this rank's rows, columns).

    Returns:
        This rank's rows of the results, shaped as ``parts``.
    """
    first = parameters[0]
    if not isinstance(first, DTensor):
        return function(parts)
    group = first.device_mesh.get_group(first.device_mesh.ndim - 1)
    ranks, (count, own, columns) = shards(first), parts.shape
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
