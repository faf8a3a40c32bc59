"""A model as a run would begin with it, without a run: for a dry run, and to overfit one batch."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from minigpt_cli.core.console import counted, log
from minigpt_cli.data.dataset_manifest import is_dataset
from minigpt_cli.data.loader import Batch, BatchLoader
from minigpt_cli.data.packing import PackedSequences
from minigpt_cli.data.sequences import TrainingData
from minigpt_cli.distributed.device import free_memory
from minigpt_cli.distributed.world import World, start_world
from minigpt_cli.huggingface.auxiliary_files import AuxiliaryFiles
from minigpt_cli.huggingface.base_model import BaseModel
from minigpt_cli.prepare.from_recipe import prepare_data
from minigpt_cli.prepare.output import refuse_foreign_files
from minigpt_cli.prepare.sample_source import prepare_sample
from minigpt_cli.recipe import Recipe
from minigpt_cli.train.base_weights import (
    auxiliary_files_of,
    fill_first_weights,
    model_template_of,
    open_recipe_base,
    start_from_base,
)
from minigpt_cli.train.preflight import (
    LossCheck,
    MemoryCheck,
    check_loss,
    check_memory,
    report_preflight,
)
from minigpt_cli.train.run import run_summary
from minigpt_cli.train.start import open_verified_data
from minigpt_cli.train.start_checks import (
    check_can_create,
    check_earlier_recipe,
    check_model,
    check_start,
)
from minigpt_cli.train.step import StepContext
from minigpt_cli.train.trainer import build_context, warm_up


@dataclass(frozen=True)
class Trial:
    """What a run would begin with.

    Attributes:
        recipe: completed by the base model.
        world: this process among the others.
        data: the recipe's dataset, or a sample of its source.
        is_sample: whether it is a sample.
        context: model, optimizers and step, with the weights that training starts from.
        memory, loss: of the preflight.
    """

    recipe: Recipe
    world: World
    data: TrainingData
    is_sample: bool
    context: StepContext
    memory: MemoryCheck
    loss: LossCheck


@contextmanager
def open_trial(recipe: Recipe, run: Path | None) -> Iterator[Trial]:
    """Build the model of a recipe, with its first weights, and check them; every rank calls it.

    Args:
        recipe: as it was loaded.
        run: the run directory of a dry run: it is checked as at a start. Where the dataset isn't
            there, a sample of its source is used, and removed at the end of the ``with`` block.
            None: the dataset is prepared, and stays.

    Raises:
        UserError: the recipe can't be followed, or a start would be refused.
    """
    world = start_world(
        recipe.distributed.timeout_minutes, deterministic=recipe.train.deterministic
    )
    base, _ = open_recipe_base(recipe, world)
    if base is not None:
        recipe, base = start_from_base(recipe, base)
    world.run_on_rank0(lambda: check_model(recipe) if run is None else _check(recipe, run))
    files = auxiliary_files_of(recipe, base)
    with ExitStack() as at_end:
        is_sample = (
            run is not None and recipe.data.source is not None and not _is_there(recipe, world)
        )
        if is_sample:
            folder = at_end.enter_context(tempfile.TemporaryDirectory(prefix="minigpt-sample-"))
            recipe = _use_sample(recipe, Path(folder), files)
        else:
            template = model_template_of(recipe, files)
            world.run_on_rank0(lambda: prepare_data(recipe, template))
        yield _build(recipe, world, base, run is not None, is_sample)


def _check(recipe: Recipe, directory: Path) -> None:
    """Check what a start checks, without creating anything."""
    check_can_create(directory)
    check_start(recipe, directory)
    check_earlier_recipe(recipe, directory)
    data = Path(recipe.data_path)
    if recipe.data.source is not None and not is_dataset(data):
        check_can_create(data)
        refuse_foreign_files(data)


def _is_there(recipe: Recipe, world: World) -> bool:
    return world.run_on_rank0(lambda: is_dataset(Path(recipe.data_path)), bool)


def first_batch(trial: Trial, sequences: int) -> Batch:
    """Return the first sequences of this rank's part of the first batch, on the device."""
    train, world = trial.recipe.train, trial.world
    per_rank = train.global_batch_size // world.size
    loader = BatchLoader(
        trial.data.train,
        seed=train.seed,
        global_batch_size=train.global_batch_size,
        local_slice=slice(world.rank * per_rank, world.rank * per_rank + sequences),
        device=world.device,
    )
    try:
        return loader(0)
    finally:
        loader.close()


def _use_sample(recipe: Recipe, folder: Path, files: AuxiliaryFiles) -> Recipe:
    """Each rank makes the same sample for itself: another machine wouldn't see rank 0's."""
    sampled, count = prepare_sample(recipe, folder, model_template_of(recipe, files))
    assert recipe.data.source is not None
    noun = "example" if recipe.data.source.format == "instructions" else "document"
    log(
        f"{recipe.data_path} isn't there yet: this looks only at the beginning of its source "
        f"({counted(count, noun)})"
    )
    return sampled


def _build(
    recipe: Recipe, world: World, base: BaseModel | None, dry: bool, is_sample: bool
) -> Trial:
    data = open_verified_data(recipe, world)
    free = free_memory(world.device, world.local_size)
    context = build_context(recipe, data.vocab_size, world)
    log(run_summary(recipe, context, None if is_sample else data.train.num_sequences))
    packed = isinstance(data.train, PackedSequences)
    memory = check_memory(recipe, context, free, packed)
    fill_first_weights(recipe, base, data, context.model)
    small = replace(context, micro_batch_size=1) if dry else context
    warm_up(small, recipe.train.sequence_length, packed)
    loss = check_loss(recipe, context, data, base)
    report_preflight(memory, loss, base is not None)
    return Trial(recipe, world, data, is_sample, context, memory, loss)
