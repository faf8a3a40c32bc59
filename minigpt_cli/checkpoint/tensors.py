"""A run's tensors by name: saved as safetensors by torch.distributed.checkpoint, which reshards
them, and compared with what the manifest says of them. Nothing is pickled.
"""

import json
import logging
import math
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
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

# Frozen weights are not a run's own: they stay in the base.
_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True, ignore_frozen_params=True)
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
WEIGHTS, OPTIMIZER = "weights.", "optimizer."  # prefixes of the tensors' names

# The engine tells a single process, at every save and load, that it is a single process.
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)


def tensors_of(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Weights and optimizer state by parameter name: the tensors themselves, not copies."""
    weights = get_model_state_dict(model, options=_OPTIONS)
    moments = _optimizer_state(model, optimizers)
    return {WEIGHTS + name: tensor for name, tensor in weights.items()} | {
        OPTIMIZER + name: value for name, value in moments.items() if isinstance(value, Tensor)
    }


def _optimizer_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_optimizer_state_dict(model, optimizers, options=_OPTIONS)


def save_tensors(
    directory: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    """Write this rank's safetensors files; every rank of ``group`` calls it."""
    dcp.save(
        _share(tensors, group),
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
    """As ``save_tensors``, but only the copying to memory is done when it returns.

    Args:
        stager: holds the copy; one for all saves, since its memory is used again.
    """
    saving = dcp.async_save(
        _share(tensors, group),
        storage_writer=_writer(directory, tensors),
        process_group=group,
        no_dist=group is None,
        async_stager=stager,
    )
    assert isinstance(saving, Future)
    return saving


def _share(tensors: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """What this rank saves: its shards and, of what every rank holds whole, an equal part.

    The engine would divide the writing itself, but have each rank copy everything to memory first.
    """
    if group is None:
        return tensors
    whole = {name: tensor for name, tensor in tensors.items() if not isinstance(tensor, DTensor)}
    size, begun, others = bytes_of(whole), 0, set()
    for name, tensor in sorted(whole.items()):  # ranks may hold them in different orders
        if begun * group.size() // size != group.rank():
            others.add(name)
        begun += tensor.numel() * tensor.element_size()
    return {name: tensor for name, tensor in tensors.items() if name not in others}


def _writer(directory: Path, tensors: dict[str, Tensor]) -> HuggingFaceStorageWriter:
    """The weights go into the first file of a rank, the optimizer's state into the second.

    Args:
        tensors: those of all ranks.
    """
    files = {name: 1 if name.startswith(WEIGHTS) else 2 for name in tensors}
    # With more than one thread the engine calls a torn file a success.
    return HuggingFaceStorageWriter(str(directory), files, thread_count=1, save_distributed=True)


def own_files(directory: Path, rank: int) -> list[Path]:
    """The files that ``save_tensors`` wrote on this rank."""
    return sorted(directory.glob(f"shard-{rank + 1:05d}-model-*.safetensors"))


def read_tensors(
    directory: Path,
    tensors: dict[str, Tensor],
    recorded: dict[str, Any],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fill ``tensors`` in place from a checkpoint, whoever wrote it; every rank of ``group`` does.

    The engine casts silently and leaves out silently, so names, shapes and dtypes are compared
    with ``recorded`` (the manifest's list) first.

    Raises:
        UserError: the checkpoint doesn't hold exactly what is wanted.
    """
    for name, tensor in tensors.items():
        wanted = describe(tensor)
        if recorded.get(name) != wanted:
            raise UserError(
                f"{directory}: {name} should be {wanted['dtype']} {wanted['shape']}, but the "
                f"checkpoint holds {recorded.get(name) or 'no such tensor'}: "
                "it belongs to another model, optimizer or precision"
            )
    reader = HuggingFaceStorageReader(str(directory))
    try:
        dcp.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None)
    except CheckpointException as error:
        raise cause_of(error) from error


def cause_of(error: BaseException) -> BaseException:
    """What an error of the engine is about: a signal's exception, the disk's, or the first one."""
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


def describe(tensor: Tensor) -> dict[str, Any]:
    """The manifest's entry for a tensor: of the whole of it, where it is sharded."""
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def bytes_of(tensors: dict[str, Tensor]) -> int:
    """How much a checkpoint of these tensors takes, over all ranks."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def load_tensors(
    directory: Path,
    recorded: dict[str, Any],
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fill a model and its optimizers from a verified checkpoint, each rank its shards."""
    moments = _optimizer_state(model, optimizers)
    weights = get_model_state_dict(model, options=_OPTIONS)
    wanted = {WEIGHTS + name: tensor for name, tensor in weights.items()}
    wanted |= {OPTIMIZER + name: v for name, v in moments.items() if isinstance(v, Tensor)}
    if extra := sorted(recorded.keys() - wanted.keys()):
        raise UserError(
            f"{directory}: holds {extra[0]} and {len(extra) - 1} more tensors that this model and "
            "optimizer don't have: it belongs to another recipe"
        )
    read_tensors(directory, wanted, recorded, group)
    model.load_state_dict(weights, strict=False)  # which names there must be was compared above
    set_optimizer_state_dict(model, optimizers, moments, options=_OPTIONS)


def whole_reader(
    directory: Path, files: list[str], recorded: dict[str, Any]
) -> Callable[[str], Tensor]:
    """Reads one tensor of a verified checkpoint at a time, put together from all ranks' shards."""
    places: dict[str, list[tuple[str, list[int]]]] = {name: [] for name in recorded}
    for file in files:
        for name, (_, begin, _) in _shards_in(directory / file).items():
            places[name].append((file, begin))

    def read(name: str) -> Tensor:
        entry = recorded[name]
        whole = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for file, begin in places[name]:
            with safe_open(directory / file, framework="pt") as opened:
                part: Tensor = opened.get_tensor(name)
            if part.numel():
                region = tuple(slice(b, b + n) for b, n in zip(begin, part.shape, strict=True))
                whole[region] = part
        return whole

    return read


def mismatched_shards(directory: Path, files: list[str], recorded: dict[str, Any]) -> list[str]:
    """Where the safetensors files hold something else than the tensors that are recorded.

    The engine would silently cast, or leave out what no file holds; so the shards that the files'
    headers tell of must lie side by side and make up exactly the recorded tensors.
    """
    problems: list[str] = []
    shards: dict[str, list[_Shard]] = {name: [] for name in recorded}
    for file in files:
        try:
            held = _shards_in(directory / file)
        except Exception as error:  # safetensors has no error of its own for Python
            return [f"{directory / file}: is not a safetensors file of a checkpoint: {error!r}"]
        for name, (dtype, begin, sizes) in held.items():
            entry = recorded.get(name)
            if entry is None or _DTYPES.get(dtype) != entry["dtype"]:
                problems.append(f"{directory / file}: {name} is not as the manifest says")
            else:
                shards[name].append((begin, sizes))
    for name, entry in recorded.items():
        whole = entry["shape"]
        count = sum(math.prod(sizes) for _, sizes in shards[name])
        if count != math.prod(whole):
            problems.append(f"{directory}: holds {count} of {math.prod(whole)} elements of {name}")
        elif not _make_up(whole, shards[name]):
            problems.append(f"{directory}: the shards of {name} overlap or lie beyond its end")
    return problems


_Shard = tuple[list[int], list[int]]  # where it begins, its sizes


def _shards_in(file: Path) -> dict[str, tuple[str, list[int], list[int]]]:
    """Name -> dtype, where it begins in the whole tensor, sizes; of what a file's header tells."""
    with safe_open(file, framework="pt") as opened:
        places = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: (
                part.get_dtype(),
                list(map(int, places[name]["saved_offsets"])),
                part.get_shape(),
            )
            for name, part in slices.items()
        }


def _make_up(whole: list[int], shards: list[_Shard]) -> bool:
    """Whether shards, cut along the first dimension, lie side by side from the start to the end."""
    reached = [0] * len(whole)
    for begin, sizes in sorted(shards):
        if math.prod(sizes):  # else of a rank for which no rows were left
            if begin != reached or sizes[1:] != whole[1:]:
                return False
            reached = [begin[0] + sizes[0], *begin[1:]] if whole else []
    return reached[:1] == whole[:1]
