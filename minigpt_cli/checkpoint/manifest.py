"""manifest.json: a checkpoint's files with their checksums, and its tensors."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from minigpt_cli.core.errors import Damaged
from minigpt_cli.core.files import json_checksum
from minigpt_cli.core.run_dir import (
    AUXILIARY_FILES,
    CHECKPOINT_MANIFEST,
    RECIPE,
    STATE,
    TOKENIZER,
    checkpoint_step,
)

_SMALL_FILES = (STATE, RECIPE, TOKENIZER, AUXILIARY_FILES)
_FORMAT = 2


class FileEntry(TypedDict):
    """What is recorded of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint holds.

    Attributes:
        step: Optimizer steps done.
        files: File name -> {"bytes": size, "sha256": hex}; all files but the manifest.
        tensors: Tensor name -> {"dtype": name, "shape": list}, of the whole tensor.
        val_loss: The validation loss at this step; None if there was no evaluation.
    """

    step: int
    files: dict[str, FileEntry]
    tensors: dict[str, dict[str, Any]]
    val_loss: float | None

    @property
    def tensor_files(self) -> list[str]:
        """The names of the safetensors files."""
        return [name for name in self.files if name.endswith(".safetensors")]


def write_checkpoint_manifest(checkpoint: Path, manifest: CheckpointManifest) -> None:
    """Write ``manifest`` into the directory ``checkpoint``, with a checksum of itself.

    Raises:
        OSError: The disk is full or can't be written to.
    """
    content: dict[str, Any] = {
        "format": _FORMAT,
        "step": manifest.step,
        "val_loss": manifest.val_loss,
        "files": dict(sorted(manifest.files.items())),
        "tensors": manifest.tensors,
    }
    content["checksum"] = json_checksum(content)
    (checkpoint / CHECKPOINT_MANIFEST).write_text(_text(content))


def read_checkpoint_manifest(checkpoint: Path) -> CheckpointManifest:
    """Read a checkpoint's manifest and check its form, but not the files that it lists.

    Raises:
        Damaged: The manifest is missing, or isn't as ``write_checkpoint_manifest`` wrote it.
    """
    file = checkpoint / CHECKPOINT_MANIFEST
    if not file.exists() and not file.is_symlink():
        raise Damaged(f"{checkpoint}: has no {file.name}, so the checkpoint is incomplete")
    if file.is_symlink() or not file.is_file():  # reading a pipe would block
        raise Damaged(f"{file}: is not a regular file")
    try:
        text = file.read_text()
        raw = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{file}: can't be read: {error}") from None
    try:
        if raw["format"] != _FORMAT:
            raise Damaged(
                f"{checkpoint}: format {raw['format']!r}; this version of minigpt reads {_FORMAT}"
            )
        unchanged = text == _text(raw)
        if raw.pop("checksum") != json_checksum(raw) or not unchanged:
            raise Damaged(f"{file}: its content doesn't match its checksum")
        manifest = CheckpointManifest(raw["step"], raw["files"], raw["tensors"], raw["val_loss"])
        _check_types(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{file}: is not a manifest ({error!r})") from None
    for name in manifest.files:
        if Path(name).name != name or name in ("", ".", ".."):
            raise Damaged(f"{checkpoint}: the manifest names a file outside it: {name!r}")
        if not name.endswith(".safetensors") and name not in _SMALL_FILES:
            raise Damaged(f"{checkpoint}: the manifest names {name}, which no checkpoint holds")
    if checkpoint_step(checkpoint) not in (None, manifest.step):
        raise Damaged(f"{checkpoint}: its manifest is of step {manifest.step}")
    return manifest


def _check_types(manifest: CheckpointManifest) -> None:
    """Raise TypeError for a value of the wrong type: a received manifest may be forged."""
    if type(manifest.step) is not int:
        raise TypeError("step")
    loss = manifest.val_loss
    if loss is not None and not (isinstance(loss, float) and math.isfinite(loss)):
        raise TypeError("val_loss")
    for name, file in manifest.files.items():
        if not (isinstance(file["bytes"], int) and isinstance(file["sha256"], str)):
            raise TypeError(name)
    for name, entry in manifest.tensors.items():
        sizes = entry["shape"]
        if not (isinstance(entry["dtype"], str) and isinstance(sizes, list)):
            raise TypeError(name)
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise TypeError(name)


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
