"""Checkpoints on disk: commit all or nothing, find the newest valid one, keep some, verify.

A checkpoint is a directory ``step-00000500`` whose ``manifest.json`` names every other file with
its size and sha256. It is written under another name, each file flushed to disk, the manifest
last, and then renamed: a directory of that name is complete, or something damaged it later.
"""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from minigpt_cli.checkpoint.state import describe
from minigpt_cli.errors import Damaged, UserError

MANIFEST = "manifest.json"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})$")


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds."""

    step: int
    files: dict[str, dict[str, Any]]  # name -> bytes, sha256
    tensors: dict[str, dict[str, Any]]  # name -> dtype, shape
    val_loss: float | None  # where an evaluation was made at this step


def checkpoints_dir(run: Path) -> Path:
    return run / "checkpoints"


def list_steps(run: Path) -> list[tuple[int, Path]]:
    """(step, directory) of the committed checkpoints, oldest first; none of them verified."""
    try:
        entries = list(checkpoints_dir(run).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [(int(match[1]), path) for path in entries if (match := _NAME.match(path.name))]
    return sorted(found)


def commit(
    run: Path,
    step: int,
    write: Callable[[Path], None],
    tensors: dict[str, Tensor],
    val_loss: float | None,
) -> Path:
    """Write a checkpoint so that it exists whole or not at all.

    Args:
        write: fills the directory it is given; the manifest is made from what it leaves there.

    Raises:
        UserError: the disk is full or can't be written to; older checkpoints are untouched.
    """
    parent = checkpoints_dir(run)
    final = parent / f"step-{step:08d}"
    temporary = parent / f".writing-{final.name}"
    replaced = parent / f".replaced-{final.name}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir()
        write(temporary)
        files = {}
        for path in sorted(temporary.iterdir()):
            _flush(path)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        manifest = {
            "format": FORMAT,
            "step": step,
            "val_loss": val_loss,
            "files": files,
            "tensors": {name: describe(tensor) for name, tensor in tensors.items()},
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        _flush(temporary / MANIFEST)
        _flush(temporary)
        if final.exists():  # the same step again, now with its evaluation; see sweep()
            final.rename(replaced)
        temporary.rename(final)
        _flush(parent)
        _remove(replaced)
    except BaseException as error:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        _remove(temporary)
        if cause := _os_error(error):
            raise UserError(
                f"{final}: the checkpoint could not be written: {_reason(cause)}; "
                "older checkpoints are untouched: make room or mend the path, then minigpt resume"
            ) from error
        raise
    return final


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest, its form checked but not the files that it names.

    Raises:
        Damaged: there is none, or it can't be what ``commit`` wrote.
    """
    try:
        raw = json.loads((checkpoint / MANIFEST).read_text())
    except FileNotFoundError:
        raise Damaged(f"{checkpoint}: has no {MANIFEST}, so it is not a whole checkpoint") from None
    except (OSError, ValueError) as error:
        raise Damaged(f"{checkpoint / MANIFEST}: can't be read: {error}") from None
    try:
        if raw["format"] != FORMAT:
            raise Damaged(
                f"{checkpoint}: format {raw['format']!r}; this version of minigpt reads {FORMAT}"
            )
        manifest = Manifest(raw["step"], raw["files"], raw["tensors"], raw["val_loss"])
        for name, entry in manifest.files.items():
            if Path(name).name != name or name in ("", ".", ".."):
                raise Damaged(f"{checkpoint}: the manifest names a file outside it: {name!r}")
            if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
                raise TypeError(name)
    except (KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{checkpoint / MANIFEST}: is not a manifest ({error!r})") from None
    if (named := _NAME.match(checkpoint.name)) and int(named[1]) != manifest.step:
        raise Damaged(f"{checkpoint}: its manifest is of step {manifest.step}")
    return manifest


def verify(checkpoint: Path) -> list[str]:
    """Everything that is wrong with a checkpoint's files, a line each; empty when it is valid."""
    try:
        manifest = read_manifest(checkpoint)
    except Damaged as error:
        return [str(error)]
    problems = []
    for name, entry in manifest.files.items():
        path = checkpoint / name
        try:
            if path.is_symlink() or not path.is_file():
                problems.append(f"{path}: missing")
            elif (size := path.stat().st_size) != entry["bytes"]:
                problems.append(f"{path}: {size} bytes, {entry['bytes']} were written")
            elif file_sha256(path) != entry["sha256"]:
                problems.append(f"{path}: its content is not what was written (sha256 differs)")
        except OSError as error:
            problems.append(f"{path}: can't be read: {_reason(error)}")
    # The engine reads every safetensors file that it finds, so a stranger counts as damage.
    for path in sorted(checkpoint.iterdir()):
        if path.name != MANIFEST and path.name not in manifest.files:
            problems.append(f"{path}: is not in the manifest")
    return problems


def require_valid(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint whose every file is what was written.

    Raises:
        Damaged: names the files that are not.
    """
    if problems := verify(checkpoint):
        raise Damaged(
            "; ".join(problems) + ". Use another checkpoint of the run; minigpt verify shows which"
        )
    return read_manifest(checkpoint)


def newest_valid(run: Path) -> tuple[Path, Manifest, list[str]]:
    """The newest checkpoint that verifies, and what is wrong with those that were passed over.

    Raises:
        UserError: the run has no checkpoint yet.
        Damaged: it has some, and none is valid.
    """
    skipped: list[str] = []
    steps = list_steps(run)
    for _, checkpoint in reversed(steps):
        problems = verify(checkpoint)
        if not problems:
            return checkpoint, read_manifest(checkpoint), skipped
        skipped.append(f"{checkpoint.name} passed over: {'; '.join(problems)}")
    if steps:
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
    if _NAME.match(path.name) or (path / MANIFEST).exists():
        return path.parent.parent, path
    if path.name == "checkpoints":
        return path.parent, None
    if checkpoints_dir(path).is_dir() or (path / "recipe.toml").exists():
        return path, None
    raise UserError(f"{path}: neither a run directory nor a checkpoint")


def choose(path: Path) -> tuple[Path, Path, Manifest, list[str]]:
    """(run directory, checkpoint, its manifest, what was passed over) for a user's ``path``.

    Raises:
        UserError: it is neither a run nor a checkpoint, or has no checkpoint yet.
        Damaged: the checkpoint asked for, or every one of the run, is damaged.
    """
    run, checkpoint = locate(path)
    if checkpoint is not None:
        return run, checkpoint, require_valid(checkpoint), []
    return run, *newest_valid(run)


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint that is no longer on the run's path, so that nothing resumes from it."""
    number = 1
    while (aside := checkpoint.with_name(f"{checkpoint.name}.aside-{number}")).exists():
        number += 1
    checkpoint.rename(aside)
    return aside


def sweep(run: Path) -> None:
    """Remove what a killed process left half written or half deleted; put back what it had moved
    out of the way of a new checkpoint that never came."""
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


def _os_error(error: BaseException) -> OSError | None:
    """The OSError behind an error of the engine, which wraps what its writer raised."""
    seen: list[BaseException] = [error]
    while seen:
        each = seen.pop()
        if isinstance(each, OSError):
            return each
        failures = getattr(each, "failures", None)  # CheckpointException: rank -> (error, trace)
        if isinstance(failures, dict):
            seen += [failure[0] for failure in failures.values()]
        seen += [linked for linked in (each.__cause__, each.__context__) if linked is not None]
    return None


def _reason(error: OSError) -> str:
    if error.errno == errno.ENOSPC:
        return "the disk is full"
    return error.strerror or str(error)
