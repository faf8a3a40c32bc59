"""manifest.json: a checkpoint's files with their checksums, and its tensors."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from minigpt_cli.core.errors import Damaged
from minigpt_cli.core.files import json_checksum
from minigpt_cli.core.reading import build, parse_json, read_text
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


class TensorEntry(TypedDict):
    """What is recorded of a tensor: its dtype's name and its shape, of the whole if sharded."""

    dtype: str
    shape: list[int]


@dataclass(frozen=True)
class CheckpointManifest:
    """What a checkpoint holds.

    Attributes:
        step: Optimizer steps done.
        files: By name; all files but the manifest.
        tensors: By name.
        val_loss: The validation loss at this step; None if there was no evaluation.
    """

    step: int
    files: dict[str, FileEntry]
    tensors: dict[str, TensorEntry]
    val_loss: float | None

    def __post_init__(self) -> None:
        """Check the names of the files.

        Raises:
            ValueError: A checkpoint holds no file of this name.
        """
        for name in self.files:
            if Path(name).name != name or name in ("", ".", ".."):
                raise ValueError(f"it names a file outside its checkpoint: {name!r:.80}")
            if not name.endswith(".safetensors") and name not in _SMALL_FILES:
                raise ValueError(f"it names {name}, which no checkpoint holds")

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
    if file.is_symlink():
        raise Damaged(f"{file}: is not a regular file")
    text = read_text(file, Damaged)
    raw = parse_json(text, str(file), Damaged)
    try:
        if raw["format"] != _FORMAT:
            raise Damaged(
                f"{checkpoint}: format {raw['format']!r:.80}; this minigpt reads {_FORMAT}"
            )
        unchanged = text == _text(raw)
        if raw.pop("checksum") != json_checksum(raw) or not unchanged:
            raise Damaged(f"{file}: its content doesn't match its checksum")
        del raw["format"]
        manifest: CheckpointManifest = build(CheckpointManifest, raw)
    except (KeyError, ValueError) as error:
        raise Damaged(f"{file}: is not a manifest ({error})") from None
    if checkpoint_step(checkpoint) not in (None, manifest.step):
        raise Damaged(f"{checkpoint}: its manifest is of step {manifest.step}")
    return manifest


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"
