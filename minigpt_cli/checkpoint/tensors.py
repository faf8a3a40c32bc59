"""A run's weights and optimizer state on disk, in safetensors files; nothing is pickled.

torch.distributed.checkpoint (DCP) writes and reads the files, for any number of ranks. It casts
and omits silently, so names, shapes and dtypes are compared with the manifest first.
"""

import logging
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor

from minigpt_cli.core.errors import Stopped, UserError

# Frozen weights belong to the base model and are not saved.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)
WEIGHTS_PREFIX, OPTIMIZER_PREFIX = "weights.", "optimizer."  # of the tensors' names

# In a single process DCP warns at each save and load that there is only one.
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


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


def save_tensors(
    directory: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Write this rank's safetensors files. A collective: every rank of ``group`` must call it.

    Args:
        directory: The same for all ranks; it must exist.
        tensors: See ``tensors_of``.
        group: The ranks that save together; None for a single process.

    Raises:
        CheckpointException: A rank failed; see ``cause_of``. It is a BaseException.
    """
    dcp.save(
        _part_of_rank(tensors, group),
        storage_writer=_writer(directory, tensors),
        process_group=group,
        no_dist=group is None,
    )


def start_saving_tensors(
    directory: Path,
    tensors: dict[str, Tensor],
    group: dist.ProcessGroup | None,
    stager: DefaultStager,
) -> "Future[Any]":
    """Copy the tensors to memory and start to write them. A collective, as ``save_tensors``.

    Args:
        directory: The same for all ranks; it must exist.
        tensors: See ``tensors_of``. They may be changed when this returns.
        group: The ranks that save together; None for a single process.
        stager: Holds the copy. Use the same one for all saves, so that its memory is reused.

    Returns:
        A future that is done when this rank's files are written. It raises as ``save_tensors``.
    """
    saving = dcp.async_save(
        _part_of_rank(tensors, group),
        storage_writer=_writer(directory, tensors),
        process_group=group,
        no_dist=group is None,
        async_stager=stager,
    )
    assert isinstance(saving, Future)
    return saving


def _part_of_rank(tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Return the tensors that this rank saves: its shards, and some of the unsharded tensors.

    DCP divides the writing too, but each rank would first copy all tensors to memory.
    """
    if group is None:
        return tensors
    whole = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    size, begun, others = bytes_of(whole), 0, set()
    for name, tensor in sorted(whole.items()):  # the order may differ between ranks
        if begun * group.size() // size != group.rank():
            others.add(name)
        begun += tensor.numel() * tensor.element_size()
    return {name: tensor for name, tensor in tensors.items() if name not in others}


def _writer(directory: Path, tensors: dict[str, Tensor]) -> HuggingFaceStorageWriter:
    """Return DCP's writer: a rank's first file gets weights, its second the optimizer's state.

    Args:
        directory: Where the files go.
        tensors: Those of all ranks.
    """
    files = {name: 1 if name.startswith(WEIGHTS_PREFIX) else 2 for name in tensors}
    # With more than one thread DCP reports success for a file that it could not write whole.
    return HuggingFaceStorageWriter(str(directory), files, thread_count=1, save_distributed=True)


def own_files(directory: Path, rank: int) -> list[Path]:
    """Return the files that ``save_tensors`` wrote on this rank."""
    return sorted(directory.glob(f"shard-{rank + 1:05d}-model-*.safetensors"))


def read_tensors(
    directory: Path,
    tensors: dict[str, Tensor],
    recorded: dict[str, Any],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fill ``tensors`` in place from a checkpoint. A collective, as ``save_tensors``.

    Args:
        directory: A verified checkpoint, saved by any number of ranks.
        tensors: The tensors to fill; DTensors get their shards.
        recorded: The manifest's tensors.
        group: The ranks that load together; None for a single process.

    Raises:
        UserError: A tensor is missing in the checkpoint, or has another shape or dtype.
        OSError: The files can't be read.
    """
    for name, tensor in tensors.items():
        wanted = tensor_entry(tensor)
        if recorded.get(name) != wanted:
            raise UserError(
                f"{directory}: {name}: expected {wanted['dtype']} {wanted['shape']}, but the "
                f"checkpoint holds {recorded.get(name) or 'no such tensor'}: "
                "it belongs to another model, optimizer or precision"
            )
    reader = HuggingFaceStorageReader(str(directory))
    try:
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise cause_of(error) from error


def cause_of(error: BaseException) -> BaseException:
    """Return the cause of an error of DCP. A Stopped counts first, then an OSError."""
    found: list[BaseException] = []
    left = [error]
    while left:
        each = left.pop()
        if isinstance(each, CheckpointException):
            left += [failure for failure, _ in each.failures.values()]
        else:
            found.append(each)
            left += [linked for linked in (each.__cause__, each.__context__) if linked is not None]
    for kind in (Stopped, OSError, BaseException):
        for each in found:
            if isinstance(each, kind):
                return each
    return error


def tensor_entry(tensor: Tensor) -> dict[str, Any]:
    """Return the manifest's entry for a tensor: dtype and shape, of the whole if it is sharded."""
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def bytes_of(tensors: dict[str, Tensor]) -> int:
    """Return the size in bytes of a checkpoint of these tensors, over all ranks."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def load_tensors(
    directory: Path,
    recorded: dict[str, Any],
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fill a model and its optimizers from a checkpoint. A collective, as ``save_tensors``.

    Args:
        directory: A verified checkpoint, saved by any number of ranks.
        recorded: The manifest's tensors.
        model: May be sharded; its frozen weights stay as they are.
        optimizers: All optimizers of the model.
        group: The ranks that load together; None for a single process.

    Raises:
        UserError: The checkpoint doesn't hold exactly the tensors of ``tensors_of``.
        OSError: The files can't be read.
    """
    moments = _optimizer_state(model, optimizers)
    weights = get_model_state_dict(model, options=_OPTIONS)
    wanted = {WEIGHTS_PREFIX + name: tensor for name, tensor in weights.items()}
    wanted |= {OPTIMIZER_PREFIX + name: v for name, v in moments.items() if isinstance(v, Tensor)}
    if extra := sorted(recorded.keys() - wanted.keys()):
        raise UserError(
            f"{directory}: holds tensors that this model and optimizer don't have ({extra[0]} and "
            f"{len(extra) - 1} more): it belongs to another recipe"
        )
    read_tensors(directory, wanted, recorded, group)
    model.load_state_dict(weights, strict=False)  # the names were compared above
    set_optimizer_state_dict(model, optimizers, moments, options=_OPTIONS)
