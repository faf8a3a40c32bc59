"""A recipe and a starting point -> a Run for fit().

``pretrain``, ``finetune-lora`` and ``resume`` differ only here: in where the weights and the state
come from.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from minigpt_cli import recipe as recipes
from minigpt_cli.checkpoint import base as bases
from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.base import Companions
from minigpt_cli.checkpoint.saver import check_room
from minigpt_cli.checkpoint.state import RunState, read_state
from minigpt_cli.checkpoint.tensors import bytes_of, load_tensors, tensors_of
from minigpt_cli.data.instructions import is_instructions
from minigpt_cli.data.manifest import MANIFEST, write_atomically
from minigpt_cli.data.packing import PackedSplit
from minigpt_cli.data.tokenizer import fingerprint, load_tokenizer, vocabulary_size
from minigpt_cli.distributed import parallel
from minigpt_cli.distributed.failure import StatusRecord, record_status
from minigpt_cli.distributed.world import World, start_world
from minigpt_cli.errors import UserError
from minigpt_cli.model import lora
from minigpt_cli.model.config import config_from_recipe
from minigpt_cli.model.gpt import GPT, initialize
from minigpt_cli.recipe import Distributed, Recipe
from minigpt_cli.report import metrics
from minigpt_cli.report.console import say, warn
from minigpt_cli.train import finish, guard
from minigpt_cli.train.base import (
    check_tokenizer,
    companions_of,
    load_base,
    open_base,
    with_tokenizer,
)
from minigpt_cli.train.build import build, warm_up
from minigpt_cli.train.changes import (
    check_base,
    check_changes,
    check_dataset,
    environment,
    warn_of_another_machine,
)
from minigpt_cli.train.prepare import prepare_data
from minigpt_cli.train.run import Run

RECIPE = "recipe.toml"


def start_run(recipe: Recipe, directory: Path) -> tuple[Run, RunState]:
    """A new run in ``directory``, from random weights or a base; on every rank. Its data is made
    first, where it isn't there.

    Raises:
        UserError: the directory already holds a run's checkpoints, or the recipe can't be followed.
    """
    world = start_world(recipe.distributed.timeout_minutes, directory)
    _check_directory(directory)
    base, identity = open_base(recipe, world)
    if base is not None:
        say(base.report)
        base = with_tokenizer(base, recipe)
        recipe = bases.complete(recipe, base)
        if recipe.lora is not None:  # before the data is made, which may take hours
            with torch.device("meta"):
                lora.targets(GPT(base.config), recipe.lora.target_modules)
        given = recipe.data.tokenizer.path if recipe.data.tokenizer is not None else None
        if given is not None and given != str(base.tokenizer):
            check_tokenizer(given, base, fingerprint(load_tokenizer(given)))
    with ExitStack() as resources:
        companions = companions_of(recipe, base)
        record = _claim(directory, world, resources, recipe, companions)
        run, state = build(recipe, directory, world, resources, companions)
        record.state = state
        if base is None:
            initialize(run.trainer.model, recipe.train.seed, parallel.assign)
        else:
            check_tokenizer(recipe.data_path, base, state.dataset["tokenizer"])
            load_base(recipe, base, run)
            if recipe.lora is not None:
                state.dataset["base"] = identity
        return _ready(run, state, resources), state


def _check_start(recipe: Recipe, directory: Path) -> None:
    """What can be refused before the data is prepared, which may take hours.

    Raises:
        UserError: the model's sizes don't fit together, or ``directory`` holds a run already.
    """
    config_from_recipe(recipe, vocab_size=1)
    given, path = recipe.data.tokenizer, Path(recipe.data_path)
    made = recipe.data.source is None or (path / MANIFEST).exists() or is_instructions(path)
    if not made and given is not None and given.path is not None:
        size, most = vocabulary_size(load_tokenizer(given.path)), recipe.model.vocab_size
        if most is not None and most < size:
            raise UserError(
                f"[model] vocab_size {most} is too small: {given.path} has {size} entries"
            )
    _check_directory(directory)


def _check_directory(directory: Path) -> None:
    if store.is_checkpoint(directory) or directory.name == "checkpoints":
        raise UserError(f"{directory} belongs to a run's checkpoints: choose another --out")
    if store.holds_a_checkpoint(directory):
        at = "".join(f" at step {step}" for step, _ in store.list_steps(directory)[-1:])
        raise UserError(
            f"{directory} already holds a run{at}: go on with minigpt resume {directory}, "
            "or choose another --out"
        )


def check_recipe_is_elsewhere(recipe_file: Path, directory: Path) -> None:
    """Refuse to replace the user's recipe by the resolved one that a run keeps of it.

    Raises:
        UserError: the recipe lies where the run would write its own.
    """
    if recipe_file.resolve() == (directory / RECIPE).resolve():
        raise UserError(
            f"{recipe_file} would be overwritten by the run's own copy of it: choose another --out"
        )


def resume_run(path: Path, overrides: list[str], allow_changes: list[str]) -> tuple[Run, RunState]:
    """The run at ``path`` (its directory, or one checkpoint in it) as it stood there.

    Args:
        overrides: ``section.key=value`` settings to change from here on.
        allow_changes: keys among them that alter what was already trained, and may.

    Raises:
        UserError: there is nothing to resume, or a change that isn't allowed.
        Damaged: no checkpoint is valid, or the dataset is not the one trained on.
    """
    directory, named = store.locate(path)
    if named is not None and named.parent != store.checkpoints_dir(directory):
        raise UserError(f"{named}: to go on from it, put it under RUN/checkpoints/")
    world = start_world(_timeout_minutes(directory, overrides), directory)
    with ExitStack() as resources:
        record = _claim(directory, world, resources)
        _, checkpoint, manifest, passed_over = store.choose(path, world)
        for problem in passed_over:
            warn(problem)
        # What the last resume of the run changed holds; a checkpoint that is named brings its own.
        source = directory if named is None and (directory / RECIPE).exists() else checkpoint
        old = recipes.load(source / RECIPE, name=directory.name)
        recipe = recipes.load(source / RECIPE, overrides, name=directory.name)
        check_changes(old, recipe, allow_changes)
        record.state = state = read_state(checkpoint)
        base, identity = open_base(recipe, world) if recipe.lora is not None else (None, None)
        if base is not None:
            recipe = bases.complete(recipe, base)
            check_base(recipe, state, identity)
        run, fresh = build(recipe, directory, world, resources, bases.companions_in(checkpoint))
        if base is not None:
            load_base(recipe, base, run)
            fresh.dataset["base"] = identity
        check_dataset(recipe, state, fresh, allow_changes)
        load_tensors(
            checkpoint,
            manifest.tensors,
            run.trainer.model,
            run.trainer.optimizers,
            world.control,
        )
        if state.scaler:
            run.trainer.scaler.load_state_dict(state.scaler)
        guard.restore(run.trainer.guard, state.guard, state.step, state.skipped)
        for step, later in store.list_steps(directory) if world.rank == 0 else []:
            if step > state.step:
                aside = store.set_aside(later)
                say(f"{later.name} is beyond where the run goes on from: now {aside.name}")
        warn_of_another_machine(run)
        say(f"resuming {directory} from step {state.step} of {recipe.total_steps}")
        return _ready(run, state, resources), state


def _timeout_minutes(directory: Path, overrides: list[str]) -> float:
    try:
        return recipes.load(directory / RECIPE, overrides).distributed.timeout_minutes
    except UserError:  # said later, if it matters
        return Distributed.timeout_minutes


def _claim(
    directory: Path,
    world: World,
    resources: ExitStack,
    new: Recipe | None = None,
    companions: Companions | None = None,
) -> StatusRecord:
    """Rank 0 locks the run directory for as long as the resources are open, cleans it up, and makes
    a new run's data; the others wait.

    Returns the record that rank 0 keeps in status.json from here on.

    Raises:
        UserError: another process trains in it, or it can't be written to.
    """
    record = StatusRecord(directory)

    def claim() -> bool:
        nonlocal record
        if new is not None:
            _check_start(new, directory)
        resources.enter_context(_claimed(directory))
        if new is not None:
            _check_start(new, directory)  # again: another process may just have left
        record = resources.enter_context(record_status(directory))
        store.sweep(directory)
        finish.clear(directory)
        if new is not None:
            prepare_data(new, companions)
        return True

    world.run_on_rank0(claim)
    return record


@contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{directory}: can't be written to: {error.strerror}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{directory}: another process is training in it") from None
        yield
    finally:
        os.close(lock)


def _ready(run: Run, state: RunState, resources: ExitStack) -> Run:
    """The run, with its files opened: the last thing before training, since it changes them."""
    packed = isinstance(run.batches.rows, PackedSplit)
    warm_up(run.trainer, run.recipe.train.sequence_length, packed)
    tensors = tensors_of(run.trainer.model, run.trainer.optimizers)
    size = bytes_of(tensors)
    if run.world.rank == 0:
        if warning := check_room(run.directory, size, run.recipe.checkpoint):
            warn(warning)
        at = state.step or -1
        metrics.cut_back(run.directory, at, evaluated=state.evaluated_step == state.step)
        _record(run)
        file = metrics.MetricsFile(run.directory)
        resources.callback(file.close)
        run = replace(run, metrics=file)
    return replace(run, resources=resources.pop_all())


def _record(run: Run) -> None:
    """Write what the run directory holds beside the checkpoints."""
    machine = json.dumps(environment(run), indent=2) + "\n"
    try:
        for name, content in {
            RECIPE: recipes.dump(run.recipe).encode(),
            "tokenizer.json": run.tokenizer_json,
            "environment.json": machine.encode(),
        }.items():
            write_atomically(run.directory / name, content)
    except OSError as error:
        raise UserError(f"{run.directory}: can't be written to: {error.strerror}") from None
