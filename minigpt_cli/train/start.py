"""A recipe and a starting point -> a Run and its state, for ``fit``.

pretrain, finetune-lora and resume differ only here: in the source of weights and state.
"""

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.saver import check_room
from minigpt_cli.checkpoint.state import RunState, read_state
from minigpt_cli.core.console import log, warn
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import write_atomically
from minigpt_cli.core.run_dir import (
    CHECKPOINTS,
    ENVIRONMENT,
    METRICS,
    RECIPE,
    SAMPLES,
    TOKENIZER,
    checkpoints_dir,
)
from minigpt_cli.data.packing import PackedSequences
from minigpt_cli.data.sequences import TrainingData, open_data, verify_data
from minigpt_cli.distributed.device import free_memory
from minigpt_cli.distributed.failure import StatusRecord, record_status
from minigpt_cli.distributed.world import World, start_world
from minigpt_cli.huggingface.auxiliary_files import auxiliary_files_of_checkpoint
from minigpt_cli.huggingface.base_model import complete_recipe
from minigpt_cli.huggingface.bounds import check_checkpoint_sizes
from minigpt_cli.model.config import config_from_recipe
from minigpt_cli.prepare.from_recipe import prepare_data
from minigpt_cli.recipe import (
    DistributedSettings,
    Recipe,
    dump_recipe,
    load_recipe,
)
from minigpt_cli.report.metrics import MetricsFile, cut_back
from minigpt_cli.report.trackers.client import Trackers
from minigpt_cli.train.base_weights import (
    auxiliary_files_of,
    fill_first_weights,
    load_recipe_base,
    model_template_of,
    open_recipe_base,
    start_from_base,
)
from minigpt_cli.train.changes import (
    check_base,
    check_changes,
    check_dataset,
    warn_about_environment,
)
from minigpt_cli.train.checkpointing import restore_checkpoint
from minigpt_cli.train.finish import remove_stale_export
from minigpt_cli.train.preflight import (
    check_loss,
    check_memory,
    checkpoint_bytes,
    report_preflight,
)
from minigpt_cli.train.run import Run, build_run, run_environment
from minigpt_cli.train.run_lock import run_lock
from minigpt_cli.train.start_checks import (
    check_directory,
    check_earlier_recipe,
    check_start,
    check_writable,
)
from minigpt_cli.train.trainer import warm_up


def start_run(recipe: Recipe, directory: Path) -> tuple[Run, RunState]:
    """Start a new run from random weights or a base model; every rank calls it.

    The recipe's data is prepared first if it isn't there.

    Args:
        recipe: as it was loaded.
        directory: the run directory, which may not exist yet.

    Returns:
        (the run, its state at step 0), for ``fit``, which closes the run.

    Raises:
        UserError: the directory already holds a run, or the recipe can't be followed.
    """
    world = start_world(recipe.distributed.timeout_minutes, directory, recipe.train.deterministic)
    check_directory(directory)
    base, base_fingerprint = open_recipe_base(recipe, world)
    if base is not None:
        recipe, base = start_from_base(recipe, base)
    auxiliary_files = auxiliary_files_of(recipe, base)
    with ExitStack() as resources:

        def lock() -> None:
            check_start(recipe, directory)
            resources.enter_context(run_lock(directory))
            check_start(recipe, directory)  # again: another process may just have left
            check_earlier_recipe(recipe, directory)

        def prepare() -> None:
            _remove_leftovers(directory)
            prepare_data(recipe, model_template_of(recipe, auxiliary_files))

        world.run_on_rank0(lock)
        record = _keep_status(directory, world, resources)
        check_writable(directory, world)
        trackers = _start_trackers(recipe, world, resources)
        world.run_on_rank0(prepare)
        data = open_verified_data(recipe, world)
        free = free_memory(world.device, world.local_size)
        run = build_run(recipe, data, directory, world, resources, auxiliary_files)
        # Before the weights take theirs
        memory = check_memory(recipe, run.context, free, _is_packed(run))
        record.state = state = RunState(dataset=data.fingerprints)
        fill_first_weights(recipe, base, data, run.context.model)
        if recipe.lora is not None:
            state.dataset["base"] = base_fingerprint
        _warm_up(run)
        loss = check_loss(recipe, run.context, data, base)
        report_preflight(memory, loss, base is not None)
        return _ready(run, state, resources, trackers), state


def resume_run(path: Path, overrides: list[str], allow_changes: list[str]) -> tuple[Run, RunState]:
    """Go on with a run from a checkpoint; every rank calls it.

    Args:
        path: a run directory (its newest valid checkpoint is used), or one checkpoint in it.
        overrides: ``section.key=value`` settings to change from here on.
        allow_changes: keys that may change although they shaped the training so far.

    Returns:
        (the run, its state at the checkpoint), for ``fit``, which closes the run.

    Raises:
        UserError: there is nothing to resume, or a change isn't allowed.
        Damaged: no checkpoint is valid, or the dataset is damaged.
    """
    directory, named = store.locate(path)
    if named is not None and named.parent != checkpoints_dir(directory):
        raise UserError(f"{named}: to go on from it, put it under RUN/{CHECKPOINTS}/")
    world = start_world(*_world_settings(directory, overrides))
    with ExitStack() as resources:
        world.run_on_rank0(lambda: resources.enter_context(run_lock(directory)))
        record = _keep_status(directory, world, resources)
        check_writable(directory, world)
        world.run_on_rank0(lambda: _remove_leftovers(directory))
        _, checkpoint, manifest, skipped_checkpoints = store.choose(path, world)
        for problem in skipped_checkpoints:
            warn(problem)
        record.state = state = read_state(checkpoint)

        # The run's recipe has the last resume's changes; a checkpoint that is named has its own.
        source = directory if named is None and (directory / RECIPE).exists() else checkpoint
        before = load_recipe(source / RECIPE, name=directory.name)
        recipe = load_recipe(source / RECIPE, overrides, name=directory.name)
        check_changes(before, recipe, allow_changes)
        trackers = _start_trackers(recipe, world, resources)
        if recipe.total_steps < state.step:
            raise UserError(
                f"{checkpoint} is at step {state.step} already, but the recipe has only "
                f"{recipe.total_steps} steps: set train.steps higher, or resume an earlier one"
            )
        base, base_fingerprint = None, None
        if recipe.lora is not None:
            base, base_fingerprint = open_recipe_base(recipe, world)
            assert base is not None
            recipe = complete_recipe(recipe, base)
            check_base(recipe, state, base_fingerprint)
        data = open_verified_data(recipe, world)
        if base is None:
            config = config_from_recipe(recipe, data.vocab_size)
            check_checkpoint_sizes(config, manifest, str(source / RECIPE))
        auxiliary_files = auxiliary_files_of_checkpoint(checkpoint)
        free = free_memory(world.device, world.local_size)
        run = build_run(recipe, data, directory, world, resources, auxiliary_files)
        memory = check_memory(recipe, run.context, free, _is_packed(run))
        if base is not None:
            load_recipe_base(recipe, base, run.context.model)
            data.fingerprints["base"] = base_fingerprint
        check_dataset(recipe, state, data.fingerprints, allow_changes)
        restore_checkpoint(run.context, checkpoint, manifest, state)
        if world.rank == 0:
            _set_aside_later(directory, state.step)
        warn_about_environment(directory, run_environment(run))
        _warm_up(run)
        # The loss is not checked: weights of a later step are compared with their checksums.
        report_preflight(memory, None, False)
        log(f"resuming {directory} from step {state.step} of {recipe.total_steps}")
        return _ready(run, state, resources, trackers), state


def _world_settings(directory: Path, overrides: list[str]) -> tuple[float, Path, bool]:
    """Return the arguments of ``start_world``, from the run's recipe."""
    try:
        recipe = load_recipe(directory / RECIPE, overrides)
    except UserError:  # raised again when the recipe is loaded, if it is the one that counts
        return DistributedSettings.timeout_minutes, directory, True
    return recipe.distributed.timeout_minutes, directory, recipe.train.deterministic


def _keep_status(directory: Path, world: World, resources: ExitStack) -> StatusRecord:
    """Have rank 0 write status.json from here on; return the record to fill in."""
    if world.rank:
        return StatusRecord(directory)
    return resources.enter_context(record_status(directory))


def _start_trackers(recipe: Recipe, world: World, resources: ExitStack) -> Trackers:
    """Have rank 0 start the trackers' processes, before any work: one may not be installed."""
    trackers = Trackers()
    resources.push(trackers.close)
    world.run_on_rank0(lambda: trackers.start(recipe.log.trackers))
    return trackers


def _remove_leftovers(directory: Path) -> None:
    """Remove half-written files of a killed process."""
    store.remove_stale(directory)
    remove_stale_export(directory)


def open_verified_data(recipe: Recipe, world: World) -> TrainingData:
    """Open the recipe's dataset on every rank, after a comparison with its manifest on rank 0.

    Raises:
        UserError: there is no dataset, or no sequence to train on in it.
        Damaged: a file isn't as recorded.
    """
    if recipe.data.verify:  # it may take minutes, in which the other ranks wait for no collective
        world.run_on_rank0(lambda: verify_data(recipe))
    return open_data(recipe)


def _set_aside_later(directory: Path, step: int) -> None:
    for later, path in store.list_steps(directory):
        if later > step:
            aside = store.set_aside(path)
            log(f"{path.name} is later than step {step}, where the run goes on: now {aside.name}")


def _is_packed(run: Run) -> bool:
    return isinstance(run.batches.sequences, PackedSequences)


def _warm_up(run: Run) -> None:
    warm_up(run.context, run.recipe.train.sequence_length, _is_packed(run))


def _ready(run: Run, state: RunState, resources: ExitStack, trackers: Trackers) -> Run:
    """Check the room on the disk, then open the run's files; last, because it changes them."""
    size = checkpoint_bytes(run.context)
    if run.world.rank == 0:
        if warning := check_room(run.directory, size, run.recipe.checkpoint):
            warn(warning)
        _write_run_files(run)
        run = _open_logs(replace(run, trackers=trackers), state, resources)
    return replace(run, resources=resources.pop_all())


def _open_logs(run: Run, state: RunState, resources: ExitStack) -> Run:
    """Cut metrics.jsonl and samples.jsonl back to the state's step; open them and the trackers."""
    evaluated = state.evaluated_step == state.step
    (kept, dropped), (completed, _) = (
        cut_back(run.directory, state.step or -1, evaluated, name) for name in (METRICS, SAMPLES)
    )
    run.trackers.begin(run.recipe, run.directory, state.step, evaluated, went_back=bool(dropped))
    found = (line.get("seconds") for line in reversed(kept))
    seconds = next((each for each in found if isinstance(each, float)), 0.0)
    run.display.restart(state.step, kept, completed)
    metrics, samples = (MetricsFile(run.directory, name) for name in (METRICS, SAMPLES))
    resources.callback(metrics.close)
    resources.callback(samples.close)
    return replace(run, metrics=metrics, samples=samples, seconds_before=seconds)


def _write_run_files(run: Run) -> None:
    """Write the files of the run directory, except checkpoints and metrics."""
    environment = json.dumps(run_environment(run), indent=2) + "\n"
    try:
        write_atomically(run.directory / RECIPE, dump_recipe(run.recipe).encode())
        write_atomically(run.directory / TOKENIZER, run.tokenizer_json)
        write_atomically(run.directory / ENVIRONMENT, environment.encode())
    except OSError as error:
        raise UserError(f"{run.directory}: can't be written to: {error.strerror}") from None
