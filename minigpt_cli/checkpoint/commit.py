"""Write a checkpoint whole or not at all.

It is written under a temporary name: the files first, each flushed to disk, then the manifest.
Then it is renamed. So a directory named ``step-00000500`` is complete, or was damaged later.
"""

import errno
import shutil
from collections.abc import Iterable
from pathlib import Path

from minigpt_cli.checkpoint.manifest import (
    CheckpointManifest,
    FileEntry,
    TensorEntry,
    write_checkpoint_manifest,
)
from minigpt_cli.checkpoint.store import REPLACED, WRITING, remove_stale
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import os_reason, remove_tree, sha256_of, sync_to_disk
from minigpt_cli.core.run_dir import CHECKPOINT_MANIFEST, checkpoint_path


def begin(run: Path, step: int, small_files: dict[str, bytes]) -> Path:
    """Make the temporary directory of a new checkpoint.

    Args:
        run: The run directory.
        step: The checkpoint's step.
        small_files: Name -> content, of the files to write into it now.

    Returns:
        The directory for the other files.

    Raises:
        OSError: The disk is full or can't be written to.
    """
    temporary = unfinished_path(run, step)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(run)  # it may take up room; an earlier attempt may have failed
    temporary.mkdir()
    for name, content in small_files.items():
        (temporary / name).write_bytes(content)
    return temporary


def flush_files(files: Iterable[Path]) -> dict[str, FileEntry]:
    """Flush files to disk; return their entries for the manifest.

    Raises:
        OSError: The disk is full, or fails.
    """
    entries = {}
    for path in files:
        sync_to_disk(path)
        entries[path.name] = FileEntry(bytes=path.stat().st_size, sha256=sha256_of(path))
    return entries


def commit(
    run: Path,
    step: int,
    files: dict[str, FileEntry],
    tensors: dict[str, TensorEntry],
    val_loss: float | None,
) -> Path:
    """Turn the directory of ``begin`` into a checkpoint, whole or not at all.

    Args:
        run: The run directory.
        step: The checkpoint's step. If it has a checkpoint already, that one is replaced.
        files: The entries of all ranks' files; see ``flush_files``.
        tensors: The entries of all tensors; see ``tensor_entry``.
        val_loss: See ``CheckpointManifest``.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: The disk is full, or a file is missing; an older checkpoint of the step remains.
    """
    temporary, final = unfinished_path(run, step), checkpoint_path(run, step)
    replaced = final.with_name(REPLACED + final.name)
    for name, entry in files.items():  # another rank may have written to another disk
        if (size := (temporary / name).stat().st_size) != entry["bytes"]:
            raise OSError(errno.EIO, f"{name} holds {size} bytes, {entry['bytes']} were written")
    write_checkpoint_manifest(temporary, CheckpointManifest(step, files, tensors, val_loss))
    sync_to_disk(temporary / CHECKPOINT_MANIFEST)
    sync_to_disk(temporary)
    try:
        if final.exists():  # the same step again, now with its evaluation; see remove_stale()
            final.rename(replaced)
        temporary.rename(final)
        sync_to_disk(final.parent)
    except BaseException:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        raise
    remove_tree(replaced)
    return final


def abandon(run: Path, step: int) -> None:
    """Remove the directory of a failed save: a full disk needs the room."""
    remove_tree(unfinished_path(run, step))


def failure_reason(error: Exception) -> str:
    """Return why a save failed, in a few words."""
    if isinstance(error, UserError):
        return str(error)
    return os_reason(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def free_bytes(run: Path) -> int:
    """Return the free bytes on the disk of the run directory."""
    return shutil.disk_usage(run).free


def unfinished_path(run: Path, step: int) -> Path:
    """Return the directory of a checkpoint that is being written."""
    final = checkpoint_path(run, step)
    return final.with_name(WRITING + final.name)
