"""What is checked before a run starts, so that hours of preparing data are not lost."""

import contextlib
import errno
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from minigpt_cli.checkpoint import store
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import nearest_existing, os_reason
from minigpt_cli.core.run_dir import (
    CHECKPOINTS,
    FINAL,
    INCIDENTS,
    METRICS,
    RECIPE,
    RUN_FILES,
    STATUS,
    is_checkpoint,
)
from minigpt_cli.core.status import read_status
from minigpt_cli.data.dataset_manifest import is_dataset
from minigpt_cli.data.tokenizer import load_tokenizer, vocabulary_size
from minigpt_cli.distributed.world import World
from minigpt_cli.model.config import config_from_recipe
from minigpt_cli.recipe import Recipe, changed_settings, load_recipe


def check_recipe_is_elsewhere(recipe_file: Path, directory: Path) -> None:
    """Refuse a recipe that the run's resolved copy would overwrite.

    Raises:
        UserError: the recipe lies where the run writes its own.
    """
    if recipe_file.resolve() == (directory / RECIPE).resolve():
        raise UserError(
            f"{recipe_file} would be overwritten by the run's own copy of it: choose another --out"
        )


def check_start(recipe: Recipe, directory: Path) -> None:
    """Check all that can be checked before the data is prepared, which may take hours.

    Raises:
        UserError: recipe and tokenizer don't fit together, or the run would overwrite files.
    """
    check_model(recipe)
    check_directory(directory)
    _check_files(directory)


def check_model(recipe: Recipe) -> None:
    """Check what is known of the model before the data is prepared, which may take hours.

    Raises:
        UserError: the model's sizes don't fit together, or its vocabulary is too small for the
            tokenizer that the data will be made with.
    """
    config_from_recipe(recipe, vocab_size=1)  # raises if the sizes don't fit together
    given, path = recipe.data.tokenizer, Path(recipe.data_path)
    is_there = recipe.data.source is None or is_dataset(path)
    if not is_there and given is not None and given.path is not None:
        size, most = vocabulary_size(load_tokenizer(given.path)), recipe.model.vocab_size
        if most is not None and most < size:
            raise UserError(
                f"[model] vocab_size {most} is too small: {given.path} has {size} entries; leave "
                f"it out, or set {size} or more"
            )


def _check_files(directory: Path) -> None:
    """Refuse a directory with files that the run would overwrite.

    A run that died before its first save may start again.
    """
    found = {name for name in RUN_FILES if os.path.lexists(directory / name)}
    if not found:
        return
    is_run = read_status(directory).keys() >= {"status", "exit_code", "pid"}
    early = {STATUS, METRICS, CHECKPOINTS}  # the only ones before the recipe is written
    if not is_run or FINAL in found or (RECIPE not in found and found - early):
        name = sorted(found - {STATUS} or found)[0]
        raise UserError(
            f"{directory} holds {name}, which the run would overwrite: choose another --out"
        )


def check_earlier_recipe(recipe: Recipe, directory: Path) -> None:
    """Refuse other settings than those of the run that died here. Nobody trains here: it is locked.

    Args:
        recipe: of the new run.
        directory: holds no checkpoint.

    Raises:
        UserError: a setting differs.
    """
    if not (directory / RECIPE).exists():
        return
    earlier = load_recipe(directory / RECIPE)
    if recipe.model.vocab_size is None and earlier.origin.get("model.vocab_size") == "default":
        earlier = replace(earlier, model=replace(earlier.model, vocab_size=None))
    if changed := changed_settings(earlier, recipe):
        raise UserError(
            f"{directory} holds a run without a checkpoint and with another {changed[0][0]}: "
            "delete it, or choose another --out"
        )


def check_directory(directory: Path) -> None:
    """Refuse a directory that holds a run, or belongs to one.

    Raises:
        UserError: it does.
    """
    if is_checkpoint(directory) or directory.name == CHECKPOINTS:
        raise UserError(f"{directory} belongs to a run's checkpoints: choose another --out")
    if store.holds_a_checkpoint(directory):
        at = "".join(f" at step {step}" for step, _ in store.list_steps(directory)[-1:])
        raise UserError(
            f"{directory} already holds a run{at}: go on with minigpt resume {directory}, "
            "or choose another --out"
        )


def check_can_create(directory: Path) -> None:
    """Check that a directory can be written to, or created, without doing it.

    Raises:
        UserError: it can't.
    """
    found = nearest_existing(directory)
    if not found.is_dir():
        raise UserError(f"{directory}: can't be written to: {found} is not a directory")
    if not os.access(found, os.W_OK | os.X_OK):
        raise UserError(f"{directory}: can't be written to: {found} allows no new files")


def check_writable(directory: Path, world: World) -> None:
    """Check that each machine of a run can write to the run directory, and sees the same one.

    Every rank calls it. Each machine's first rank tries.

    Raises:
        UserError: a directory in it can't be written to, or a machine has another one of this name;
            saves would fail hours later.
    """
    is_first = world.rank % world.local_size == 0
    if is_first and (world.rank == 0 or _sees(directory)):
        for folder in (directory, *(directory / name for name in (CHECKPOINTS, INCIDENTS))):
            if folder == directory or folder.exists():
                _try_to_write(folder)
    if world.size > world.local_size:
        _check_shared(directory, world)


def _try_to_write(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:  # without a name: a kill leaves nothing
            file.write(b"x")
            file.flush()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # the check of the room says what is needed
            return
        raise UserError(
            f"{folder}: can't be written to: {os_reason(error)}; make it writable, or choose "
            "another --out"
        ) from None


def _check_shared(directory: Path, world: World) -> None:
    """Refuse another directory of this name on another machine: no checkpoint would be whole."""
    with ExitStack() as until_seen:

        def create() -> str:
            probe = until_seen.enter_context(
                tempfile.NamedTemporaryFile(dir=directory, prefix=".preflight-")
            )
            return Path(probe.name).name

        name = world.run_on_rank0(create, str)
        is_seen = world.all_gather_json(_sees(directory / name), bool)
    if not all(is_seen):
        raise UserError(
            f"rank {is_seen.index(False)} doesn't see what rank 0 writes to {directory}, and no "
            "checkpoint could be saved: put --out on a file system that all machines share"
        )


def _sees(file: Path) -> bool:
    """Return whether a file is there; a network file system may be a moment late."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            os.listdir(file.parent)  # asks the server, where a stat may be answered from a cache
            if file.exists():
                return True
        time.sleep(0.5)
    return False
