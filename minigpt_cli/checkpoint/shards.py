"""A checkpoint's safetensors files without DCP: check their headers, read whole tensors.

A rank saves its shards of the tensors in files of its own. A file's metadata holds their offsets.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

# Name of a tensor -> (number of the file, first row, count of rows) of each part that isn't empty.
ShardIndex = dict[str, list[tuple[int, int, int]]]
_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def whole_reader(
    directory: Path, files: list[str], recorded: dict[str, Any]
) -> Callable[[str], Tensor]:
    """Return a function that reads one tensor of a checkpoint, assembled from all ranks' shards.

    Args:
        directory: A verified checkpoint.
        files: The names of its safetensors files.
        recorded: The manifest's tensors.
    """
    shards: dict[str, list[tuple[str, list[int]]]] = {name: [] for name in recorded}
    for file in files:
        for name, (_, begin, _) in _shards_in(directory / file).items():
            shards[name].append((file, begin))

    def read(name: str) -> Tensor:
        entry = recorded[name]
        whole = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for file, begin in shards[name]:
            with safe_open(directory / file, framework="pt") as opened:
                part: Tensor = opened.get_tensor(name)
            if part.numel():
                region = tuple(slice(b, b + n) for b, n in zip(begin, part.shape, strict=True))
                whole[region] = part
        return whole

    return read


def read_shard_index(directory: Path, files: list[str]) -> ShardIndex:
    """Find out which rows of each tensor are in which file. Only the files' headers are read.

    Args:
        directory: A verified checkpoint.
        files: The names of its safetensors files.
    """
    index: ShardIndex = {}
    for number, file in enumerate(files):
        for name, (_, begin, sizes) in _shards_in(directory / file).items():
            if math.prod(sizes):
                place = (number, begin[0], sizes[0]) if sizes else (number, 0, 1)
                index.setdefault(name, []).append(place)
    return index


def mismatched_shards(directory: Path, files: list[str], recorded: dict[str, Any]) -> list[str]:
    """Check that the shards in the files make up exactly the recorded tensors.

    DCP would silently cast or omit tensors. Only the files' headers are read.

    Args:
        directory: The checkpoint.
        files: The names of its safetensors files.
        recorded: The manifest's tensors.

    Returns:
        A line for each problem.
    """
    problems: list[str] = []
    shards: dict[str, list[_Shard]] = {name: [] for name in recorded}
    for file in files:
        try:
            held = _shards_in(directory / file)
        except Exception as error:  # safetensors has no error of its own for Python
            return [
                f"{directory / file}: is not a safetensors file of a checkpoint: {error!r:.200}"
            ]
        different = []
        for name, (dtype, begin, sizes) in held.items():
            entry = recorded.get(name)
            if entry is None or _DTYPES.get(dtype) != entry["dtype"]:
                different.append(name)
            else:
                shards[name].append((begin, sizes))
        if different:
            others = len(different) - 1
            which = f"and {others} more differ" if others else "differs"
            problems.append(f"{directory / file}: {different[0]} {which} from the manifest")
    for name, entry in recorded.items():
        whole = entry["shape"]
        count = sum(math.prod(sizes) for _, sizes in shards[name])
        if count != math.prod(whole):
            problems.append(f"{directory}: holds {count} of {math.prod(whole)} elements of {name}")
        elif not _fill(whole, shards[name]):
            problems.append(f"{directory}: the shards of {name} overlap or exceed its shape")
    return problems


_Shard = tuple[list[int], list[int]]  # offsets in the whole tensor, sizes


def _shards_in(file: Path) -> dict[str, tuple[str, list[int], list[int]]]:
    """Read a file's header: name -> dtype, offsets in the whole tensor, sizes."""
    with safe_open(file, framework="pt") as opened:
        sharding = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: (
                part.get_dtype(),
                list(map(int, sharding[name]["saved_offsets"])),
                part.get_shape(),
            )
            for name, part in slices.items()
        }


def _fill(whole: list[int], shards: list[_Shard]) -> bool:
    """Whether shards along the first dimension cover a tensor without gaps and overlaps."""
    reached = [0] * len(whole)
    for begin, sizes in sorted(shards):
        if math.prod(sizes):  # else the shard of a rank that got no rows
            if begin != reached or sizes[1:] != whole[1:]:
                return False
            reached = [begin[0] + sizes[0], *begin[1:]] if whole else []
    return reached[:1] == whole[:1]
