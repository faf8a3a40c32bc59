"""What a run directory holds: tensors, losses and steps."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from minigpt_cli.checkpoint import store


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        found |= load_file(path)
    return found


BY_CLOCK = ("tokens_per_second", "mfu", "seconds", "time", "memory_bytes")


def curve(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in BY_CLOCK} for line in lines]


def assert_same_run(a: Path, b: Path, step: int) -> None:
    one, other = (run / f"checkpoints/step-{step:08d}" for run in (a, b))
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different
    assert (one / "state.json").read_text() == (other / "state.json").read_text()
    assert curve(a) == curve(b)


def rewind(run: Path, to: int) -> None:
    """As if the run had been killed after this checkpoint."""
    for step, path in store.list_steps(run):
        if step > to:
            shutil.rmtree(path)


def whole_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor put together from the shards that the files say they hold."""
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


def steps_saved(run: Path) -> list[int]:
    found = (run / "checkpoints").glob("step-????????")
    return sorted(int(path.name.removeprefix("step-")) for path in found)


def steps_logged(run: Path) -> int:
    """Also while it is written to."""
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"grad_norm")
    except FileNotFoundError:
        return 0
