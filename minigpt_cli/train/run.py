"""A run: everything that the training loop works with."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt_cli.checkpoint.saver import Saver
from minigpt_cli.core.console import log
from minigpt_cli.core.environment import training_environment
from minigpt_cli.core.reading import MAX_TOKENIZER_BYTES, read_bytes
from minigpt_cli.data.loader import BatchLoader, Sequences
from minigpt_cli.data.sequences import TrainingData
from minigpt_cli.data.tokenizer import eos_id, load_tokenizer, token_byte_lengths
from minigpt_cli.distributed.device import device_name
from minigpt_cli.distributed.world import World
from minigpt_cli.huggingface.auxiliary_files import AuxiliaryFiles
from minigpt_cli.model.cost import flops_per_token, parameter_count, peak_flops
from minigpt_cli.recipe import Recipe
from minigpt_cli.report.live import TrainingDisplay
from minigpt_cli.report.metrics import MetricsFile
from minigpt_cli.report.trackers.client import Trackers
from minigpt_cli.train.samples import Prompts
from minigpt_cli.train.step import StepContext
from minigpt_cli.train.trainer import build_context, count_parameters


@dataclass(frozen=True)
class Validation:
    """The data that a run is evaluated on.

    Attributes:
        sequences: the validation split.
        token_bytes: (vocab_size,) int32, UTF-8 bytes of each token; None if the tokenizer has no
            such table.
        bytes_per_token: the split's mean, used without such a table.
    """

    sequences: Sequences
    token_bytes: NDArray[np.int32] | None
    bytes_per_token: float


@dataclass(frozen=True)
class Run:
    """What ``fit`` works with.

    Attributes:
        recipe: the resolved recipe.
        directory: the run directory.
        world: this process among the others.
        context: model, optimizers and step.
        batches: this rank's batches, by step.
        validation: None without a validation split.
        prompts: completed at each evaluation.
        display: shows the progress.
        metrics, samples: metrics.jsonl and samples.jsonl on rank 0, once everything else is ready;
            else None.
        trackers: get the lines of both; none on other ranks.
        seconds_before: of training in earlier processes; known on rank 0.
        saver: writes the checkpoints.
        tokenizer_json: the content of tokenizer.json.
        auxiliary_files: saved beside the weights.
        flops_per_token: of forward and backward pass.
        peak_flops: of all devices, per second; None if it isn't known.
        resources: the directory's lock, open files and threads; closed when the run ends.
    """

    recipe: Recipe
    directory: Path
    world: World
    context: StepContext
    batches: BatchLoader
    validation: Validation | None
    prompts: Prompts
    display: TrainingDisplay
    metrics: MetricsFile | None
    samples: MetricsFile | None
    trackers: Trackers
    seconds_before: float
    saver: Saver
    tokenizer_json: bytes
    auxiliary_files: AuxiliaryFiles
    flops_per_token: int
    peak_flops: float | None
    resources: ExitStack


def build_run(
    recipe: Recipe,
    data: TrainingData,
    directory: Path,
    world: World,
    resources: ExitStack,
    auxiliary_files: AuxiliaryFiles,
) -> Run:
    """Build a run without weights, and log a summary of it.

    Args:
        recipe, data, directory, world: see ``Run``.
        resources: takes everything that must be closed at the end.
        auxiliary_files: of the base model or the tokenizer.

    Raises:
        UserError: the recipe doesn't fit the data, the ranks or their devices.
    """
    context = build_context(recipe, data.vocab_size, world)
    tokenizer = load_tokenizer(data.tokenizer_file)
    per_rank = recipe.train.global_batch_size // world.size
    batches = BatchLoader(
        data.train,
        seed=recipe.train.seed,
        global_batch_size=recipe.train.global_batch_size,
        local_slice=slice(world.rank * per_rank, (world.rank + 1) * per_rank),
        device=world.device,
    )
    resources.callback(batches.close)
    _, trained = count_parameters(context.model)
    peak = peak_flops(device_name(world.device))
    log(run_summary(recipe, context, data.train.num_sequences))
    return Run(
        recipe=recipe,
        directory=directory,
        world=world,
        context=context,
        batches=batches,
        validation=None
        if data.val is None
        else Validation(data.val, token_byte_lengths(tokenizer), data.bytes_per_token),
        prompts=Prompts(
            texts=recipe.eval.prompts,
            tokenizer=tokenizer,
            eos_id=eos_id(tokenizer),
            max_new_tokens=recipe.eval.prompt_tokens,
            dtype=context.dtype,
        ),
        display=TrainingDisplay(recipe.total_steps, recipe.optimizer.clip_norm),
        metrics=None,
        samples=None,
        trackers=Trackers(),
        seconds_before=0.0,
        saver=resources.enter_context(Saver(directory, world, recipe.checkpoint)),
        tokenizer_json=read_bytes(data.tokenizer_file, limit=MAX_TOKENIZER_BYTES),
        auxiliary_files=auxiliary_files.with_template(data.chat_template),
        flops_per_token=flops_per_token(
            context.model.config, recipe.train.sequence_length, trained if recipe.lora else None
        ),
        peak_flops=None if peak is None else peak * world.size,
        resources=resources,
    )


def run_environment(run: Run) -> dict[str, Any]:
    """Return the content of the run's environment.json."""
    return training_environment(
        device=device_name(run.world.device),
        device_type=run.world.device.type,
        computing_dtype=str(run.context.dtype).removeprefix("torch."),
        ranks=run.world.size,
        strategy=run.context.parallel_dims.strategy,
    )


def run_summary(recipe: Recipe, context: StepContext, sequences: int | None) -> str:
    """Return a summary of model, data and duration, for a person.

    Args:
        recipe, context: see ``Run``.
        sequences: of the training split; None if that isn't known.
    """
    _, trained = count_parameters(context.model)
    model, world, train = context.model, context.parallel_dims.world, recipe.train
    micro = context.micro_batch_size
    accumulation = train.global_batch_size // (world.size * micro)
    ranks = f"{world.size} ranks ({context.parallel_dims.strategy}) x " if world.size > 1 else ""
    batches = "micro-batch" if accumulation == 1 else "micro-batches"
    epochs = ""
    if sequences is not None:
        share = recipe.total_steps * train.global_batch_size / sequences
        epochs = f": {share:.2f} epochs of {sequences:,} sequences"
    whole = parameter_count(model.config)
    adapters = ""
    if recipe.lora is not None:
        share = trained / (whole + trained)
        adapters = f" and {trained:,} of adapters, which are trained ({share:.2%})"
    return (
        f"{recipe.model.family}, {whole:,} parameters{adapters}, vocabulary "
        f"{model.config.vocab_size:,}; {device_name(world.device)}, "
        f"{str(context.dtype).removeprefix('torch.')}\n"
        f"{recipe.total_steps:,} steps of {train.global_batch_size} x {train.sequence_length} "
        f"tokens ({ranks}{accumulation} {batches} of {micro}){epochs}"
    )
