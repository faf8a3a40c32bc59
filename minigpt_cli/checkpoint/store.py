"""A run's checkpoints on disk: find the newest valid one, delete old ones.

A checkpoint is a directory ``step-00000500`` whose ``manifest.json`` lists every other file with
its size and sha256. A directory without a valid manifest is no checkpoint. See also commit.py.
"""

import contextlib
import fcntl
import os
from pathlib import Path

from minigpt_cli.checkpoint.integrity import require_valid, verify_on_all_ranks
from minigpt_cli.checkpoint.manifest import CheckpointManifest, read_checkpoint_manifest
from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.core.files import remove_tree
from minigpt_cli.core.run_dir import (
    CHECKPOINT_MANIFEST,
    RECIPE,
    checkpoint_step,
    checkpoints_dir,
    is_checkpoint,
    run_of,
)
from minigpt_cli.data.dataset_manifest import is_dataset
from minigpt_cli.distributed.world import World

# Prefixes of the names of directories that are no checkpoints: unfinished, replaced, or obsolete.
WRITING, REPLACED, _DELETING = ".writing-", ".replaced-", ".deleting-"
_MOST_SPARED = 2  # checkpoints that are being read; a reader that never ends must not fill the disk


def list_steps(run: Path) -> list[tuple[int, Path]]:
    """Return (step, directory) of a run's checkpoints, oldest first. They are not verified."""
    try:
        entries = list(checkpoints_dir(run).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((step, path) for path in entries if (step := checkpoint_step(path)) is not None)


def holds_a_checkpoint(run: Path) -> bool:
    """Whether a run has a checkpoint, or one that ``remove_stale`` would restore."""
    return bool(list_steps(run)) or any(checkpoints_dir(run).glob(f"{REPLACED}step-*"))


def newest_valid(
    run: Path, world: World | None = None
) -> tuple[Path, CheckpointManifest, list[str]]:
    """Find a run's newest checkpoint that verifies.

    Args:
        run: The run directory.
        world: All its ranks must call. They look at the checkpoints that rank 0 finds.

    Returns:
        The checkpoint, its manifest, and a line for each newer one that was skipped.

    Raises:
        UserError: The run has no checkpoint yet.
        Damaged: It has some, but none is valid.
    """
    skipped: list[str] = []
    names = [checkpoint.name for _, checkpoint in list_steps(run)]
    if world is not None:
        sent = map(os.path.basename, world.all_gather_json(names, list[str])[0])
        names = [name for name in sent if checkpoint_step(Path(name)) is not None]
    for name in reversed(names):
        checkpoint = checkpoints_dir(run) / name
        manifest, problems = verify_on_all_ranks(checkpoint, world)
        if manifest is not None and not problems:
            return checkpoint, manifest, skipped
        if world is None and not checkpoint.exists():
            continue  # the run has just pruned it
        skipped.append(f"{name} skipped: {'; '.join(problems)}")
    if names:
        raise Damaged(
            f"{run}: no valid checkpoint: restore one from a copy, or start another run. "
            + ". ".join(skipped)
        )
    raise UserError(f"{run}: no checkpoint yet; repeat the command that started the run")


def locate(path: Path) -> tuple[Path, Path | None]:
    """Return (run directory, checkpoint) for a user's ``path``; None if it is a run.

    Raises:
        UserError: It is neither a run nor a checkpoint.
    """
    if not path.exists():
        raise UserError(f"{path}: no such run or checkpoint")
    run = run_of(path)
    if is_checkpoint(whole := Path(os.path.abspath(path))):
        return run, whole if run.is_absolute() else Path(os.path.relpath(whole))
    if checkpoints_dir(run).is_dir() or (run / RECIPE).exists():
        return run, None
    raise UserError(f"{path}: {_what_it_is(path)}")


def _what_it_is(path: Path) -> str:
    """Return in a few words what is there instead of a run, and what to do."""
    if not path.is_dir():
        return "is a file; name a run directory, a checkpoint or a Hugging Face directory"
    if is_dataset(path):
        return "is a token dataset, neither a run directory nor a checkpoint; name the model"
    if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return (
            "is a Hugging Face directory, neither a run directory nor a checkpoint; to train it "
            "further, name it in a recipe: [model] init_from, or [lora] base"
        )
    return (
        f"neither a run directory nor a checkpoint: it holds no {RECIPE}; nor a Hugging Face "
        "directory: it holds no config.json"
    )


def choose(
    path: Path, world: World | None = None
) -> tuple[Path, Path, CheckpointManifest, list[str]]:
    """Find the checkpoint that a user's ``path`` means; a run means its newest valid one.

    Args:
        path: A run directory, or one of its checkpoints.
        world: See ``newest_valid``.

    Returns:
        The run directory, and what ``newest_valid`` returns.

    Raises:
        UserError: It is neither a run nor a checkpoint, or the run has no checkpoint yet.
        Damaged: This checkpoint, or each one of the run, is damaged.
    """
    run, checkpoint = locate(path)
    if world is None:  # else this process trains in the run, and prunes it
        for each in [checkpoint] if checkpoint else [path for _, path in list_steps(run)[-1:]]:
            hold(each)
    if checkpoint is not None:
        return run, checkpoint, require_valid(checkpoint, world), []
    return run, *newest_valid(run, world)


def hold(checkpoint: Path) -> None:
    """Keep a checkpoint from being pruned while this process lives, where the disk has locks."""
    with contextlib.suppress(OSError):
        fcntl.flock(_open_manifest(checkpoint), fcntl.LOCK_SH | fcntl.LOCK_NB)


def _is_held(checkpoint: Path) -> bool:
    """Whether another process reads a checkpoint; see ``hold``."""
    try:
        with open(_open_manifest(checkpoint), "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a disk without locks
        return False
    return False


def _open_manifest(checkpoint: Path) -> int:
    """Open a checkpoint's manifest to lock it; a pipe in its place would block otherwise."""
    file = checkpoint / CHECKPOINT_MANIFEST
    return os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def prune(run: Path, *, keep_last: int, keep_best: bool, keep_every: int | None) -> None:
    """Delete the checkpoints that no rule keeps, except a few that other processes read.

    Args:
        run: The run directory.
        keep_last: Keep so many of the newest.
        keep_best: Keep the one with the lowest validation loss.
        keep_every: Keep those of steps that are multiples of it.
    """
    steps = list_steps(run)
    keep = {step for step, _ in steps[-keep_last:]}
    if keep_every:
        keep |= {step for step, _ in steps if step % keep_every == 0}
    if keep_best:
        losses = []
        for step, path in steps:
            try:
                val_loss = read_checkpoint_manifest(path).val_loss
            except Damaged:
                continue
            if val_loss is not None:
                losses.append((val_loss, step))
        if losses:
            keep.add(min(losses)[1])
    spared = 0
    for step, path in steps:
        if step not in keep:
            if spared < _MOST_SPARED and _is_held(path):
                spared += 1  # until the next save
                continue
            # Renamed first: an interrupted deletion must not leave half a checkpoint.
            doomed = path.with_name(_DELETING + path.name)
            remove_tree(doomed)
            path.rename(doomed)
            remove_tree(doomed)


def set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint so that nothing resumes from it; return its new path."""
    number = 1
    while (aside := checkpoint.with_name(f"{checkpoint.name}.aside-{number}")).exists():
        number += 1
    checkpoint.rename(aside)
    return aside


def remove_stale(run: Path) -> None:
    """Clean up after interrupted saves and deletions.

    A checkpoint that was moved aside for a new one, which was never finished, is moved back.
    """
    if checkpoints_dir(run).is_dir():
        for path in list(checkpoints_dir(run).iterdir()):
            original = path.with_name(path.name.removeprefix(REPLACED))
            if original != path and not original.exists():
                path.rename(original)
            elif path.name.startswith((WRITING, _DELETING, REPLACED)):
                remove_tree(path)
