"""A run's weights and optimizer state on disk, in safetensors files; nothing is pickled.

torch.distributed.checkpoint (DCP) plans, writes and reads the files, for any number of ranks. Its
planners, writer and reader are called here directly: ``dcp.save`` and ``dcp.load`` unpickle what
other ranks send. DCP casts and omits silently, so names, shapes and dtypes are compared with the
manifest first.
"""

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    SavePlan,
)
from torch.distributed.checkpoint._hf_utils import _HFStorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from minigpt_cli.checkpoint.manifest import CheckpointManifest, TensorEntry
from minigpt_cli.checkpoint.shards import ShardIndex, read_shard_index
from minigpt_cli.core.errors import UserError
from minigpt_cli.distributed.world import World

# Frozen weights belong to the base model and are not saved.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)
WEIGHTS_PREFIX, OPTIMIZER_PREFIX = "weights.", "optimizer."  # of the tensors' names


def tensors_of(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Return the trained weights and the optimizer state, by parameter name.

    Args:
        model: May be sharded; its frozen weights are left out.
        optimizers: All optimizers of the model.

    Returns:
        "weights.NAME" and "optimizer.state.NAME.KEY" -> the tensor itself, not a copy (a DTensor
        if it is sharded).
    """
    weights = get_model_state_dict(model, options=_OPTIONS)
    moments = _optimizer_state(model, optimizers)
    return {WEIGHTS_PREFIX + name: tensor for name, tensor in weights.items()} | {
        OPTIMIZER_PREFIX + name: value
        for name, value in moments.items()
        if isinstance(value, Tensor)
    }


def _optimizer_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_optimizer_state_dict(model, optimizers, options=_OPTIONS)


def own_part(tensors: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """Return the tensors that this rank saves: its shards, and a share of what several ranks hold.

    Each rank finds its part alone, from the device mesh. DCP would gather the plans of all ranks
    by pickles on rank 0, which takes seconds for hundreds of ranks.

    Args:
        tensors: See ``tensors_of``; of the same names, shapes and dtypes on all ranks.
        rank: This rank, 0 to ``ranks`` - 1.
        ranks: The number of ranks that save together.
    """
    own, begun = {}, Counter[int]()  # bytes, by the number of holders
    holders = {name: _holders(tensor, rank, ranks) for name, tensor in tensors.items()}
    sizes = {name: bytes_of({name: tensor}) for name, tensor in tensors.items()}
    total = Counter[int]()
    for name, (_, count) in holders.items():
        total[count] += sizes[name]
    for name in sorted(tensors):  # the order may differ between ranks
        number, count = holders[name]
        if begun[count] * count // max(1, total[count]) == number and _holds_any(tensors[name]):
            own[name] = tensors[name]
        begun[count] += sizes[name]
    return own


def _holders(tensor: Tensor, rank: int, ranks: int) -> tuple[int, int]:
    """Return this rank's number among the ranks that hold the same values, and their count."""
    if not isinstance(tensor, DTensor):
        return rank, ranks
    number, count = 0, 1
    for dim, placement in enumerate(tensor.placements):
        if placement.is_replicate():
            size = tensor.device_mesh.size(dim)
            number = number * size + tensor.device_mesh.get_local_rank(dim)
            count *= size
    return number, count


def _holds_any(tensor: Tensor) -> bool:
    """Return whether this rank has values of the tensor: of a short one it may have no rows."""
    return not isinstance(tensor, DTensor) or tensor.to_local().numel() > 0


def save_tensors(directory: Path, part: dict[str, Tensor], names: Iterable[str], rank: int) -> int:
    """Write this rank's safetensors files; other ranks need not be there.

    A rank's first file gets weights, its second the optimizer's state.

    Args:
        directory: It must exist.
        part: See ``own_part``; or a copy of it.
        names: Those of the tensors of all ranks.
        rank: This rank.

    Returns:
        The number of bytes that the tensors in the files take.

    Raises:
        OSError: The disk is full, or fails.
    """
    files = {name: 1 if name.startswith(WEIGHTS_PREFIX) else 2 for name in names}
    # With more than one thread DCP reports success for a file that it could not write whole.
    writer = HuggingFaceStorageWriter(str(directory), files, thread_count=1, save_distributed=True)
    planner = DefaultSavePlanner()
    planner.set_up_planner(part, writer.storage_meta(), is_coordinator=rank == 0)
    writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=True)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    (plan,), _ = planner.create_global_plan([plan])
    # DCP numbers the files by a plan's place in this list.
    plan = writer.prepare_global_plan([SavePlan([])] * rank + [plan])[rank]
    written = writer.write_data(planner.finish_plan(plan), planner).wait()
    return sum(result.size_in_bytes for result in written)


def own_files(directory: Path, rank: int) -> list[Path]:
    """Return the files that ``save_tensors`` wrote on this rank."""
    return sorted(file for file in directory.iterdir() if is_file_of(file.name, rank))


def is_file_of(name: str, rank: int) -> bool:
    """Return whether this is the name of a file that ``save_tensors`` writes on a rank."""
    return bool(re.fullmatch(rf"shard-{rank + 1:05d}-model-\d+-of-\d+\.safetensors", name))


def read_tensors(
    directory: Path,
    tensors: dict[str, Tensor],
    manifest: CheckpointManifest,
    world: World | None = None,
) -> None:
    """Fill ``tensors`` in place from a checkpoint.

    Args:
        directory: A verified checkpoint, saved by any number of ranks.
        tensors: The tensors to fill; DTensors get their shards.
        manifest: Of the checkpoint.
        world: All its ranks must call: rank 0 reads the files' headers for all. None: this process
            does.

    Raises:
        UserError: A tensor is missing in the checkpoint, or has another shape or dtype.
        OSError: The files can't be read.
    """
    for name, tensor in tensors.items():
        wanted, recorded = tensor_entry(tensor), manifest.tensors
        if recorded.get(name) != wanted:
            raise UserError(
                f"{directory}: {name}: expected {wanted['dtype']} {wanted['shape']}, but the "
                f"checkpoint holds {recorded.get(name) or 'no such tensor'}: "
                "it belongs to another model, optimizer or precision"
            )
    index: ShardIndex = {}
    if world is None or world.rank == 0:
        index = read_shard_index(directory, manifest.tensor_files)
    if world is not None:
        index = world.broadcast_json(index, ShardIndex)
    metadata = _dcp_metadata(directory, manifest, index)
    reader, planner = HuggingFaceStorageReader(str(directory)), DefaultLoadPlanner()
    planner.set_up_planner(tensors, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    (plan,) = reader.prepare_global_plan(planner.create_global_plan([plan]))
    reader.read_data(planner.finish_plan(plan), planner).wait()


def _dcp_metadata(directory: Path, manifest: CheckpointManifest, index: ShardIndex) -> Metadata:
    """Return what ``HuggingFaceStorageReader.read_metadata`` reads from all files' headers."""
    files = [str(directory / name) for name in manifest.tensor_files]
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _HFStorageInfo] = {}
    for name, parts in index.items():
        entry = manifest.tensors[name]
        shape, dtype = entry["shape"], getattr(torch, entry["dtype"])
        chunks = []
        for file, first, rows in parts:
            offsets = torch.Size([first, *(0 for _ in shape[1:])] if shape else [])
            sizes = torch.Size([rows, *shape[1:]] if shape else [])
            chunks.append(ChunkStorageMetadata(offsets, sizes))
            places[MetadataIndex(name, offsets)] = _HFStorageInfo(files[file], sizes, dtype)
        properties = TensorProperties(dtype=dtype)
        tensors[name] = TensorStorageMetadata(properties, torch.Size(shape), chunks)
    return Metadata(tensors, storage_data=places, storage_meta=StorageMeta())


def tensor_entry(tensor: Tensor) -> TensorEntry:
    """Return the manifest's entry for a tensor: dtype and shape, of the whole if it is sharded."""
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def bytes_of(tensors: dict[str, Tensor]) -> int:
    """Return the size in bytes of a checkpoint of these tensors, over all ranks."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def load_tensors(
    directory: Path,
    manifest: CheckpointManifest,
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    world: World,
) -> None:
    """Fill a model and its optimizers from a checkpoint; every rank calls it.

    Args:
        directory: A verified checkpoint, saved by any number of ranks.
        manifest: Of the checkpoint.
        model: May be sharded; its frozen weights stay as they are.
        optimizers: All optimizers of the model.
        world: The ranks.

    Raises:
        UserError: The checkpoint doesn't hold exactly the tensors of ``tensors_of``.
        OSError: The files can't be read.
    """
    moments = _optimizer_state(model, optimizers)
    weights = get_model_state_dict(model, options=_OPTIONS)
    wanted = {WEIGHTS_PREFIX + name: tensor for name, tensor in weights.items()}
    wanted |= {OPTIMIZER_PREFIX + name: v for name, v in moments.items() if isinstance(v, Tensor)}
    if extra := sorted(manifest.tensors.keys() - wanted.keys()):
        raise UserError(
            f"{directory}: holds tensors that this model and optimizer don't have ({extra[0]} and "
            f"{len(extra) - 1} more): it belongs to another recipe"
        )
    read_tensors(directory, wanted, manifest, world)
    model.load_state_dict(weights, strict=False)  # the names were compared above
    set_optimizer_state_dict(model, optimizers, moments, options=_OPTIONS)
