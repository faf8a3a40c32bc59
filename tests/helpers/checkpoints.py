"""What a checkpoint's files hold, read without our own code."""

import json
from pathlib import Path

import torch
from safetensors import safe_open


def whole_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return every tensor, put together from the shards that the files' headers describe."""
    tensors: dict[str, torch.Tensor] = {}
    recorded = json.loads((checkpoint / "manifest.json").read_text())["tensors"]
    for name, entry in recorded.items():
        tensors[name] = torch.full(entry["shape"], torch.nan, dtype=getattr(torch, entry["dtype"]))
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118
                part = file.get_tensor(name)
                offsets = places[name]["saved_offsets"]
                where = tuple(
                    slice(start, start + size)
                    for start, size in zip(offsets, part.shape, strict=True)
                )
                tensors[name][where] = part
    assert not any(tensor.isnan().any() for tensor in tensors.values())
    return tensors
