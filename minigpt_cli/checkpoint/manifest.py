"""manifest.json: what a checkpoint holds, and the proof that it is what was written."""

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import Damaged

MANIFEST = "manifest.json"
SMALL_FILES = ("state.json", "recipe.toml", "tokenizer.json", "huggingface.json")
FORMAT = 2
NAME = re.compile(r"step-(\d{8,})$")  # of a checkpoint's directory


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint holds."""

    step: int
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256
    tensors: dict[str, dict[str, Any]]  # name -> dtype, shape
    val_loss: float | None  # where an evaluation was made at this step


def write_checkpoint_manifest(checkpoint: Path, manifest: CheckpointManifest) -> None:
    content: dict[str, Any] = {
        "format": FORMAT,
        "step": manifest.step,
        "val_loss": manifest.val_loss,
        "files": dict(sorted(manifest.files.items())),
        "tensors": manifest.tensors,
    }
    content["checksum"] = _checksum(content)
    (checkpoint / MANIFEST).write_text(_text(content))


def read_checkpoint_manifest(checkpoint: Path) -> CheckpointManifest:
    """The manifest, its form checked but not the files that it names.

    Raises:
        Damaged: there is none, or it can't be what ``write_checkpoint_manifest`` wrote.
    """
    file = checkpoint / MANIFEST
    if not file.exists() and not file.is_symlink():
        raise Damaged(f"{checkpoint}: has no {MANIFEST}, so it is not a whole checkpoint")
    if file.is_symlink() or not file.is_file():  # a pipe would be waited for
        raise Damaged(f"{file}: is not a file of this directory")
    try:
        text = file.read_text()
        raw = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{file}: can't be read: {error}") from None
    try:
        if raw["format"] != FORMAT:
            raise Damaged(
                f"{checkpoint}: format {raw['format']!r}; this version of minigpt reads {FORMAT}"
            )
        whole = text == _text(raw)
        if raw.pop("checksum") != _checksum(raw) or not whole:
            raise Damaged(f"{file}: its content doesn't match its checksum")
        manifest = CheckpointManifest(raw["step"], raw["files"], raw["tensors"], raw["val_loss"])
        _check_types(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{file}: is not a manifest ({error!r})") from None
    for name in manifest.files:
        if Path(name).name != name or name in ("", ".", ".."):
            raise Damaged(f"{checkpoint}: the manifest names a file outside it: {name!r}")
        if not name.endswith(".safetensors") and name not in SMALL_FILES:
            raise Damaged(f"{checkpoint}: the manifest names {name}, which no checkpoint holds")
    if (named := NAME.match(checkpoint.name)) and int(named[1]) != manifest.step:
        raise Damaged(f"{checkpoint}: its manifest is of step {manifest.step}")
    return manifest


def _check_types(manifest: CheckpointManifest) -> None:
    """Raise TypeError where a value isn't of its type: somebody may mean to deceive."""
    if type(manifest.step) is not int:
        raise TypeError("step")
    loss = manifest.val_loss
    if loss is not None and not (isinstance(loss, float) and math.isfinite(loss)):
        raise TypeError("val_loss")
    for name, entry in manifest.files.items():
        if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
            raise TypeError(name)
    for name, entry in manifest.tensors.items():
        sizes = entry["shape"]
        if not (isinstance(entry["dtype"], str) and isinstance(sizes, list)):
            raise TypeError(name)
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise TypeError(name)


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
