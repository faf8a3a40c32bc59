"""A recipe and a starting point -> a Run for fit().

``pretrain``, ``finetune-lora`` and ``resume`` differ only here: in where the weights and the state
come from.
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.saver import check_room
from minigpt_cli.checkpoint.state import RunState, read_state
from minigpt_cli.checkpoint.tensors import bytes_of, load_tensors, tensors_of
from minigpt_cli.core.console import log, warn
from minigpt_cli.core.errors import Outcome, UserError
from minigpt_cli.core.files import write_atomically
from minigpt_cli.core.run_dir import ENVIRONMENT, LOCK, RECIPE, TOKENIZER
from minigpt_cli.core.status import write_status
from minigpt_cli.data.dataset_manifest import is_dataset
from minigpt_cli.data.packing import PackedSequences
from minigpt_cli.data.tokenizer import load_tokenizer, tokenizer_fingerprint, vocabulary_size
from minigpt_cli.distributed import parallel
from minigpt_cli.distributed.world import World, end_with, recorded_by, start_world
from minigpt_cli.huggingface.base_model import (
    AuxiliaryFiles,
    auxiliary_files_of_checkpoint,
    chat_template,
    complete_recipe,
)
from minigpt_cli.model import lora
from minigpt_cli.model.config import config_from_recipe
from minigpt_cli.model.gpt import GPT, initialize
from minigpt_cli.prepare.from_recipe import prepare_data
from minigpt_cli.recipe import DistributedSettings, Recipe, dump_recipe, load_recipe
from minigpt_cli.report import metrics
from minigpt_cli.train import finish, guard
from minigpt_cli.train.base import (
    auxiliary_files_of,
    check_base_tokenizer,
    load_recipe_base,
    open_recipe_base,
    with_recipe_tokenizer,
)
from minigpt_cli.train.changes import (
    check_base,
    check_changes,
    check_dataset,
    environment,
    warn_of_another_machine,
)
from minigpt_cli.train.run import Run
from minigpt_cli.train.trainer import build, warm_up

_STATUS = {3: "diverged", 75: "stopped", 130: "stopped"}  # by exit code


@dataclass
class Record:
    """What status.json is written from."""

    directory: Path
    state: RunState | None = None  # once it is known


@contextmanager
def recorded(directory: Path) -> Iterator[Record]:
    """Keep status.json true while a run is made ready and trained in the ``with`` block."""
    record = Record(directory)

    def write(status: str, exit_code: int | None, message: str) -> None:
        step = record.state.step if record.state is not None else None
        write_status(directory, status, exit_code, step, message)

    def ended(outcome: Outcome) -> None:
        write(_STATUS.get(outcome.code, "failed"), outcome.code, outcome.message)

    write("running", None, "")
    try:
        with recorded_by(ended):
            yield record
    except BaseException as error:
        ended(end_with(error))
        raise
    write("finished", 0, "")


def start_run(recipe: Recipe, directory: Path) -> tuple[Run, RunState]:
    """A new run in ``directory``, from random weights or a base; on every rank. Its data is made
    first, where it isn't there.

    Raises:
        UserError: the directory already holds a run's checkpoints, or the recipe can't be followed.
    """
    world = start_world(recipe.distributed.timeout_minutes)
    _check_directory(directory)
    base, identity = open_recipe_base(recipe, world)
    if base is not None:
        log(base.report)
        base = with_recipe_tokenizer(base, recipe)
        recipe = complete_recipe(recipe, base)
        if recipe.lora is not None:  # before the data is made, which may take hours
            with torch.device("meta"):
                lora.targets(GPT(base.config), recipe.lora.target_modules)
        given = recipe.data.tokenizer.path if recipe.data.tokenizer is not None else None
        if given is not None and given != str(base.tokenizer):
            check_base_tokenizer(given, base, tokenizer_fingerprint(load_tokenizer(given)))
    with ExitStack() as resources:
        auxiliary_files = auxiliary_files_of(recipe, base)
        record = _claim(directory, world, resources, recipe, auxiliary_files)
        run, state = build(recipe, directory, world, resources, auxiliary_files)
        record.state = state
        if base is None:
            initialize(run.context.model, recipe.train.seed, parallel.copy_full_tensor)
        else:
            check_base_tokenizer(recipe.data_path, base, state.dataset["tokenizer"])
            load_recipe_base(recipe, base, run)
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
    made = recipe.data.source is None or is_dataset(path)
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
    world = start_world(_timeout_minutes(directory, overrides))
    with ExitStack() as resources:
        record = _claim(directory, world, resources)
        _, checkpoint, manifest, skipped_checkpoints = store.choose(path, world)
        for problem in skipped_checkpoints:
            warn(problem)
        # What the last resume of the run changed holds; a checkpoint that is named brings its own.
        source = directory if named is None and (directory / RECIPE).exists() else checkpoint
        old = load_recipe(source / RECIPE, name=directory.name)
        recipe = load_recipe(source / RECIPE, overrides, name=directory.name)
        check_changes(old, recipe, allow_changes)
        record.state = state = read_state(checkpoint)
        base, identity = (
            open_recipe_base(recipe, world) if recipe.lora is not None else (None, None)
        )
        if base is not None:
            recipe = complete_recipe(recipe, base)
            check_base(recipe, state, identity)
        run, fresh = build(
            recipe, directory, world, resources, auxiliary_files_of_checkpoint(checkpoint)
        )
        if base is not None:
            load_recipe_base(recipe, base, run)
            fresh.dataset["base"] = identity
        check_dataset(recipe, state, fresh, allow_changes)
        load_tensors(
            checkpoint,
            manifest.tensors,
            run.context.model,
            run.context.optimizers,
            world.control,
        )
        if state.scaler:
            run.context.scaler.load_state_dict(state.scaler)
        guard.restore(run.context.guard, state.guard, state.step, state.skipped)
        for step, later in store.list_steps(directory) if world.rank == 0 else []:
            if step > state.step:
                aside = store.set_aside(later)
                log(f"{later.name} is beyond where the run goes on from: now {aside.name}")
        warn_of_another_machine(run)
        log(f"resuming {directory} from step {state.step} of {recipe.total_steps}")
        return _ready(run, state, resources), state


def _timeout_minutes(directory: Path, overrides: list[str]) -> float:
    try:
        return load_recipe(directory / RECIPE, overrides).distributed.timeout_minutes
    except UserError:  # said later, if it matters
        return DistributedSettings.timeout_minutes


def _claim(
    directory: Path,
    world: World,
    resources: ExitStack,
    new: Recipe | None = None,
    auxiliary_files: AuxiliaryFiles | None = None,
) -> Record:
    """Rank 0 locks the run directory for as long as the resources are open, cleans it up, and makes
    a new run's data; the others wait.

    Returns the record that rank 0 keeps in status.json from here on.

    Raises:
        UserError: another process trains in it, or it can't be written to.
    """
    record = Record(directory)

    def claim() -> bool:
        nonlocal record
        if new is not None:
            _check_start(new, directory)
        resources.enter_context(_claimed(directory))
        if new is not None:
            _check_start(new, directory)  # again: another process may just have left
        record = resources.enter_context(recorded(directory))
        store.remove_stale(directory)
        finish.clear(directory)
        if new is not None:
            prepare_data(new, _model_template(new, auxiliary_files))
        return True

    world.run_on_rank0(claim)
    return record


def _model_template(
    recipe: Recipe, auxiliary_files: AuxiliaryFiles | None
) -> tuple[str | None, dict[str, str]] | None:
    """Return the chat template and the special tokens of the base's files.

    None if there are no such files, or if the recipe has no instructions to render.
    """
    source, tokenizer = recipe.data.source, recipe.data.tokenizer
    if source is None or source.format != "instructions":
        return None
    if auxiliary_files is None or not auxiliary_files.files:
        return None
    assert tokenizer is not None
    assert tokenizer.path is not None
    return chat_template(Path(tokenizer.path), auxiliary_files)


@contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
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
    packed = isinstance(run.batches.sequences, PackedSequences)
    warm_up(run.context, run.recipe.train.sequence_length, packed)
    tensors = tensors_of(run.context.model, run.context.optimizers)
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
            RECIPE: dump_recipe(run.recipe).encode(),
            TOKENIZER: run.tokenizer_json,
            ENVIRONMENT: machine.encode(),
        }.items():
            write_atomically(run.directory / name, content)
    except OSError as error:
        raise UserError(f"{run.directory}: can't be written to: {error.strerror}") from None
