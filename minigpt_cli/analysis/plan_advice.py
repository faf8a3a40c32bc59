"""What makes no sense in a plan, each with the setting to change."""

from collections.abc import Iterator
from pathlib import Path

from minigpt_cli.analysis.plan import Plan, PlannedModel, shard_size_of
from minigpt_cli.checkpoint.commit import free_bytes
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import nearest_existing
from minigpt_cli.core.memory import format_size
from minigpt_cli.recipe import Recipe
from minigpt_cli.train.batch import micro_batch_size_of

MOST_EPOCHS = 4  # repeated data is worth less beyond them (Muennighoff et al. 2023)
TOKENS_PER_PARAMETER = 20  # of a compute-optimal model (Hoffmann et al. 2022)
_FAR = 5  # times more or less
_LONG_WARMUP = 0.3  # of the run
_LEAST_VALIDATION = 10_000  # tokens; the loss of fewer is noisy


def find_advice(plan: Plan, recipe: Recipe) -> list[str]:
    """Return one line for each thing that makes no sense; empty when all is well."""
    return [
        *_batch_advice(plan, recipe),
        *_length_advice(plan, recipe),
        *_validation_advice(plan, recipe),
        *([] if plan.model is None else _model_advice(plan, plan.model, recipe)),
    ]


def _batch_advice(plan: Plan, recipe: Recipe) -> Iterator[str]:
    try:
        micro_batch_size_of(recipe, plan.devices.count)
    except UserError as error:
        yield str(error)
    count, size = plan.devices.count, shard_size_of(recipe)
    if count > 1 and recipe.distributed.strategy == "hsdp" and count % size:
        yield f"distributed.shard_size {size} does not divide the {count} GPUs"
    sequences = plan.data.train_sequences
    if sequences is not None and sequences < plan.global_batch_size:
        yield (
            f"train.global_batch_size {plan.global_batch_size:,} is more than the "
            f"{sequences:,} sequences of the dataset: a step reads some of them twice"
        )


def _length_advice(plan: Plan, recipe: Recipe) -> Iterator[str]:
    warmup = recipe.schedule.warmup_steps
    if warmup > _LONG_WARMUP * plan.steps:
        yield (
            f"schedule.warmup_steps {warmup:,} is {warmup / plan.steps:.0%} of the {plan.steps:,} "
            "steps: 1 to 10% is usual"
        )
    length = "train.steps" if recipe.train.steps is not None else "train.tokens"
    if plan.epochs is not None and plan.epochs > MOST_EPOCHS:
        yield (
            f"{plan.epochs:.1f} epochs over the data: beyond {MOST_EPOCHS} more of the same data "
            f"helps little (Muennighoff et al. 2023): use more data, or a lower {length}"
        )
    if plan.model is None or recipe.base is not None:
        return
    ratio = plan.model.tokens_per_parameter
    target = TOKENS_PER_PARAMETER * plan.model.parameters
    if ratio < TOKENS_PER_PARAMETER / _FAR:
        steps = -(-target // recipe.tokens_per_step)
        longer = f"train.steps={steps}" if length == "train.steps" else f"train.tokens={target}"
        yield (
            f"{ratio:.2g} tokens per parameter, about {TOKENS_PER_PARAMETER} are compute-optimal "
            f"(Hoffmann et al. 2022): train longer ({longer}), or a smaller model "
            "(model.hidden_size, model.num_hidden_layers)"
        )
    elif ratio > TOKENS_PER_PARAMETER * _FAR:
        yield (
            f"{ratio:,.0f} tokens per parameter, about {TOKENS_PER_PARAMETER} are compute-optimal "
            "(Hoffmann et al. 2022): a larger model (model.hidden_size, model.num_hidden_layers) "
            "would learn more in the same time; a small one is cheaper to run"
        )


def _validation_advice(plan: Plan, recipe: Recipe) -> Iterator[str]:
    sequences, wanted = plan.data.val_sequences, recipe.eval.windows
    more = "a larger data.source.val_fraction" if recipe.data.source else "a dataset with more"
    if recipe.data.source is not None and recipe.data.source.val_fraction == 0:
        yield "data.source.val_fraction is 0: nothing is evaluated"
    elif sequences is not None and sequences < wanted:
        yield (
            f"eval.windows {wanted:,} is more than the {sequences:,} validation sequences of the "
            f"dataset: set a lower eval.windows, or use {more} validation"
            if sequences
            else f"the dataset has no validation sequence of {plan.sequence_length:,} tokens: "
            f"nothing is evaluated; use {more} validation"
        )
    elif not plan.data.is_packed and wanted * plan.sequence_length < _LEAST_VALIDATION:
        yield (
            f"eval.windows {wanted:,} of {plan.sequence_length:,} tokens: the loss of fewer than "
            f"{_LEAST_VALIDATION:,} tokens is noisy; set a higher eval.windows"
        )
    every = recipe.eval.every_steps
    if every is not None and every > plan.steps:
        yield f"eval.every_steps {every:,} is more than the {plan.steps:,} steps of the run"


def _model_advice(plan: Plan, model: PlannedModel, recipe: Recipe) -> Iterator[str]:
    if plan.data.vocab_source == "assumed":
        yield (
            f"the vocabulary isn't known yet, {plan.data.vocab_size:,} is assumed: give "
            "model.vocab_size, or make the dataset first"
        )
    chosen = next((each for each in model.strategies if each.is_chosen), None)
    if chosen is not None and chosen.fits is False:
        ways = []
        if plan.micro_batch_size > 1:
            ways.append(f"set train.micro_batch_size below {plan.micro_batch_size}")
        if recipe.train.activation_checkpointing is not True:
            way = "selective" if chosen.fits_selective else "true"
            ways.append(
                f"set train.activation_checkpointing={way}"
                + ("" if chosen.fits_recomputing else " (not enough alone)")
            )
        if others := [each.strategy for each in model.strategies if each.fits]:
            ways.insert(0, f"set distributed.strategy={others[0]}")
        elif plan.devices.type == "cuda":
            ways.append("take more GPUs (--gpus)")
        ways.append("make the model smaller (model.hidden_size, model.num_hidden_layers)")
        yield (
            f"{chosen.strategy} doesn't fit: {format_size(chosen.needed)} of "
            f"{format_size(plan.devices.memory or 0)}; {', or '.join(ways)}"
        )
    free = _free_disk(Path("runs"))
    if free is not None and free < model.disk_bytes:
        yield (
            f"runs/: {format_size(model.disk_bytes)} are needed for checkpoints, "
            f"{format_size(free)} are free: set a lower checkpoint.keep_last, "
            "checkpoint.keep_best=false, or --out on another disk"
        )


def _free_disk(path: Path) -> int | None:
    """Return the free bytes of the disk that holds a path, or would."""
    try:
        return free_bytes(nearest_existing(path))
    except OSError:
        return None
