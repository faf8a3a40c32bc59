"""Checkpoints on disk: commit all or nothing, find the newest valid one, keep some, verify.

A checkpoint is a directory ``step-00000500`` whose ``manifest.json`` names every other file with
its size and sha256. It is written under another name, each file flushed to disk, the manifest
last, and then renamed: a directory of that name is complete, or something damaged it later.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minigpt_cli.checkpoint.manifest import (
    MANIFEST,
    NAME,
    Manifest,
    read_manifest,
    write_manifest,
)
from minigpt_cli.checkpoint.state import nonsense
from minigpt_cli.checkpoint.tensors import cause_of, misfits
from minigpt_cli.distributed.world import World
from minigpt_cli.errors import Damaged, UserError


def checkpoints_dir(run: Path) -> Path:
    return run / "checkpoints"


def checkpoint_path(run: Path, step: int) -> Path:
    return checkpoints_dir(run) / f"step-{step:08d}"


def list_steps(run: Path) -> list[tuple[int, Path]]:
    """(step, directory) of the committed checkpoints, oldest first; none of them verified."""
    try:
        entries = list(checkpoints_dir(run).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(int(match[1]), path) for path in entries if (match := NAME.match(path.name))]
    return sorted(found)


def is_checkpoint(path: Path) -> bool:
    """Whether it is one, damaged or not, rather than a run directory."""
    return bool(NAME.match(path.name)) or (path / MANIFEST).exists()


def holds_a_checkpoint(run: Path) -> bool:
    """Also one that a killed process has moved out of the way, and that ``sweep`` puts back."""
    return bool(list_steps(run)) or any(checkpoints_dir(run).glob(".replaced-step-*"))


def begin(run: Path, step: int, small_files: dict[str, bytes]) -> Path:
    """A directory to write this step's checkpoint into, with its small files in it already.

    Raises:
        OSError: the disk is full or can't be written to.
    """
    temporary = _temporary(run, step)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    sweep(run)  # what couldn't be removed when it should have been wants its room, too
    temporary.mkdir()
    for name, content in small_files.items():
        (temporary / name).write_bytes(content)
    return temporary


def flush_files(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Bring the files to the disk itself; returns the manifest's entries for them."""
    entries = {}
    for path in files:
        _flush(path)
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    return entries


def finish(
    run: Path,
    step: int,
    files: dict[str, dict[str, Any]],
    tensors: dict[str, dict[str, Any]],
    val_loss: float | None,
) -> Path:
    """Make what was written since ``begin`` a checkpoint: whole, or not at all.

    Args:
        files: of all ranks; see ``flush_files``.
        tensors: the manifest's entries for them.

    Raises:
        OSError: the disk is full, or a file is not there.
    """
    temporary, final = _temporary(run, step), checkpoint_path(run, step)
    replaced = final.with_name(f".replaced-{final.name}")
    for name, entry in files.items():  # of another rank, whose disk may be another
        if (size := (temporary / name).stat().st_size) != entry["bytes"]:
            raise OSError(errno.EIO, f"{name} holds {size} bytes, {entry['bytes']} were written")
    write_manifest(temporary, Manifest(step, files, tensors, val_loss))
    _flush(temporary / MANIFEST)
    _flush(temporary)
    try:
        if final.exists():  # the same step again, now with its evaluation; see sweep()
            final.rename(replaced)
        temporary.rename(final)
        _flush(final.parent)
    except BaseException:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        raise
    _remove(replaced)
    return final


def abandon(run: Path, step: int) -> None:
    """Remove what a save left that failed: on a full disk its room is wanted."""
    _remove(_temporary(run, step))


def why(error: BaseException) -> str:
    """Why a save failed, in a few words."""
    cause = cause_of(error)
    if isinstance(cause, UserError):
        return str(cause)
    return _reason(cause) if isinstance(cause, OSError) else f"{type(cause).__name__}: {cause}"


def free_bytes(run: Path) -> int:
    """Room on the disk that the run's checkpoints are on."""
    return shutil.disk_usage(run).free


def _temporary(run: Path, step: int) -> Path:
    return checkpoints_dir(run) / f".writing-step-{step:08d}"


def verify(checkpoint: Path, rank: int = 0, ranks: int = 1) -> list[str]:
    """Everything that is wrong with a checkpoint's files, a line each; empty when it is valid.

    Args:
        rank, ranks: the part of the files whose content is looked at, where several share the work.
    """
    try:
        manifest = read_manifest(checkpoint)
    except Damaged as error:
        return [str(error)]
    problems = []
    for number, (name, entry) in enumerate(manifest.files.items()):
        path = checkpoint / name
        try:
            if path.is_symlink() or not path.is_file():
                problems.append(f"{path}: missing")
            elif (size := path.stat().st_size) != entry["bytes"]:
                problems.append(f"{path}: {size} bytes, {entry['bytes']} were written")
            elif number % ranks == rank and file_sha256(path) != entry["sha256"]:
                problems.append(f"{path}: its content is not what was written (sha256 differs)")
        except OSError as error:
            problems.append(f"{path}: can't be read: {_reason(error)}")
    # The engine reads every safetensors file that it finds, so a stranger counts as damage.
    for path in sorted(checkpoint.iterdir()):
        if path.name != MANIFEST and path.name not in manifest.files:
            problems.append(f"{path}: is not in the manifest")
    if not problems and rank == 0:
        tensor_files = [name for name in manifest.files if name.endswith(".safetensors")]
        problems = nonsense(checkpoint, manifest.step, manifest.files)
        problems += misfits(checkpoint, tensor_files, manifest.tensors)
    return problems


def verify_together(checkpoint: Path, world: World | None) -> list[str]:
    """``verify``, where each rank reads some of the files and all get the same answer."""
    if world is None:
        return verify(checkpoint)
    answers = world.all_gather_json(verify(checkpoint, world.rank, world.size))
    return sorted({problem for answer in answers for problem in answer})


def require_valid(checkpoint: Path, world: World | None = None) -> Manifest:
    """The manifest of a checkpoint whose every file is what was written.

    Raises:
        Damaged: names the files that are not.
    """
    if problems := verify_together(checkpoint, world):
        raise Damaged(
            "; ".join(problems) + ". Use another checkpoint of the run; minigpt verify shows which"
        )
    return read_manifest(checkpoint)


def newest_valid(run: Path, world: World | None = None) -> tuple[Path, Manifest, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with those that were passed over.

    Args:
        world: whose ranks all ask; they look at what rank 0 finds, and get the same answer.

    Raises:
        UserError: the run has no checkpoint yet.
        Damaged: it has some, and none is valid.
    """
    skipped: list[str] = []
    names = [checkpoint.name for _, checkpoint in list_steps(run)]
    names = world.all_gather_json(names)[0] if world else names
    for name in reversed(names):
        checkpoint = checkpoints_dir(run) / name
        problems = verify_together(checkpoint, world)
        if not problems:
            return checkpoint, read_manifest(checkpoint), skipped
        skipped.append(f"{name} passed over: {'; '.join(problems)}")
    if names:
        raise Damaged(f"{run}: no valid checkpoint. " + ". ".join(skipped))
    raise UserError(f"{run}: no checkpoint yet; start it again with minigpt pretrain")


def retain(run: Path, *, keep_last: int, keep_best: bool, keep_every: int | None) -> None:
    """Delete the checkpoints that no rule keeps: the last ones, the best one, the milestones."""
    steps = list_steps(run)
    keep = {step for step, _ in steps[-keep_last:]}
    if keep_every:
        keep |= {step for step, _ in steps if step % keep_every == 0}
    if keep_best:
        losses = []
        for step, path in steps:
            try:
                val_loss = read_manifest(path).val_loss
            except Damaged:
                continue
            if val_loss is not None:
                losses.append((val_loss, step))
        if losses:
            keep.add(min(losses)[1])
    for step, path in steps:
        if step not in keep:
            # Renamed first: a deletion cut short must not leave half a checkpoint under its name.
            doomed = path.with_name(f".deleting-{path.name}")
            _remove(doomed)
            path.rename(doomed)
            _remove(doomed)


def locate(path: Path) -> tuple[Path, Path | None]:
    """(run directory, checkpoint) that ``path`` means: a run means its newest valid checkpoint,
    which is left to ``newest_valid`` (None here).

    Raises:
        UserError: it is neither.
    """
    path = Path(os.path.abspath(path))
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint")
    if is_checkpoint(path):
        return path.parent.parent, path
    if path.name == "checkpoints":
        return path.parent, None
    if checkpoints_dir(path).is_dir() or (path / "recipe.toml").exists():
        return path, None
    raise UserError(f"{path}: neither a run directory nor a checkpoint")


def choose(path: Path, world: World | None = None) -> tuple[Path, Path, Manifest, list[str]]:
    """(run directory, checkpoint, its manifest, what was passed over) for a user's ``path``.

    Raises:
        UserError: it is neither a run nor a checkpoint, or has no checkpoint yet.
        Damaged: the checkpoint asked for, or every one of the run, is damaged.
    """
    run, checkpoint = locate(path)
    if checkpoint is not None:
        return run, checkpoint, require_valid(checkpoint, world), []
    return run, *newest_valid(run, world)


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint that is no longer on the run's path, so that nothing resumes from it."""
    number = 1
    while (aside := checkpoint.with_name(f"{checkpoint.name}.aside-{number}")).exists():
        number += 1
    checkpoint.rename(aside)
    return aside


def sweep(run: Path) -> None:
    """Remove what a killed process, or a disk that failed, left half written or half deleted; put
    back what it had moved out of the way of a new checkpoint that never came."""
    if checkpoints_dir(run).is_dir():
        for path in list(checkpoints_dir(run).iterdir()):
            original = path.with_name(path.name.removeprefix(".replaced-"))
            if original != path and not original.exists():
                path.rename(original)
            elif path.name.startswith((".writing-", ".deleting-", ".replaced-")):
                _remove(path)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return error.strerror or str(error)
