"""The directory that a dataset is made in: what it holds already, and errors on writing to it."""

import errno
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import UserError
from minigpt_cli.data.dataset import open_dataset
from minigpt_cli.data.dataset_manifest import DatasetManifest


def finished_dataset(out: Path, settings: dict[str, Any], *, instructions: bool) -> DatasetManifest:
    """Return the manifest of the dataset that ``out`` holds already.

    Args:
        out: the dataset's directory.
        settings: those that the dataset must have been made with.
        instructions: True if it must hold instructions, False if it must hold text.

    Raises:
        UserError: the dataset is another one.
        Damaged: a file isn't as recorded.
    """
    manifest = open_dataset(out).manifest
    if manifest.has_loss_mask != instructions:
        found = "instructions" if manifest.has_loss_mask else "text"
        raise UserError(f"{out} holds a dataset of {found}: choose another directory, or delete it")
    then = dict(manifest.settings)
    if settings["tokenizer"] == manifest.tokenizer_fingerprint:
        then["tokenizer"] = settings["tokenizer"]  # the very tokenizer that was trained here
    changed = differences(then, settings)
    if changed:
        raise UserError(
            f"{out} holds a dataset made with other settings ({'; '.join(changed)}): "
            "choose another directory, or delete it"
        )
    return manifest


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe each setting that differs between an earlier command and this one."""
    found = []
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name), now.get(name)
        if before == after:
            continue
        if name == "source_files":
            found.append("the source's files have other names or sizes")
        elif name == "tokenizer":
            found.append(f"tokenizer: {str(before)[:12]} -> {str(after)[:12]}")
        else:
            found.append(f"{name}: {before} -> {after}")
    return found


def write_error(error: OSError, out: Path) -> UserError:
    """Return the error to show when ``out`` can't be written to."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk of {out} is full: free some space and run the same command again"
        )
    where = error.filename or out
    return UserError(f"can't write to {out}: {where}: {error.strerror}; choose another directory")
