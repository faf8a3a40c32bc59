"""``--dry-run``: all that a start does, and one step on one sequence; nothing is left behind."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minigpt_cli.checkpoint.commit import free_bytes
from minigpt_cli.checkpoint.saver import check_room
from minigpt_cli.core.console import log, print_json, print_result, warn
from minigpt_cli.core.errors import Diverged
from minigpt_cli.data.order import sample_ids
from minigpt_cli.data.tokenizer import load_tokenizer
from minigpt_cli.model.cost import parameter_count
from minigpt_cli.recipe import Recipe
from minigpt_cli.train.preflight import checkpoint_bytes
from minigpt_cli.train.sequence_text import TextPart, sequence_lines, sequence_parts
from minigpt_cli.train.step import train_step
from minigpt_cli.train.trainer import count_parameters
from minigpt_cli.train.trial import Trial, first_batch, open_trial


def dry_run(recipe: Recipe, directory: Path, as_json: bool) -> None:
    """Do all that a start does but train; print the first sequence. Every rank calls it.

    The step is one on a single sequence per rank, with a learning rate of 0.

    Args:
        recipe: as it was loaded.
        directory: where the run would be; it is not created.
        as_json: print one JSON object instead of text.

    Raises:
        UserError: a start would be refused.
        Diverged: loss or gradient is not finite.
    """
    with open_trial(recipe, directory) as trial:
        world = trial.world
        size, disk = checkpoint_bytes(trial.context), _existing(directory)
        room = world.run_on_rank0(lambda: check_room(disk, size, recipe.checkpoint), str | None)
        if room is not None:
            warn(room)
        context = replace(trial.context, micro_batch_size=1)
        results = train_step(context, first_batch(trial, 1), 0, lr_factor=0.0)
        loss, grad_norm = (float(each) for each in results)
        # fp16 begins with a loss scale that overflows.
        is_finite = math.isfinite(loss) and (
            math.isfinite(grad_norm) or context.scaler.is_enabled()
        )
        if not is_finite:
            raise Diverged(
                f"the loss of one sequence is {loss}, its gradient's norm {grad_norm}: look at "
                "precision.dtype and model.initializer_range"
            )
        if world.rank == 0:
            index, examples = _first_sequence(trial)
            if as_json:
                found = _facts(trial, directory, size, free_bytes(disk), room)
                found |= {"loss": _finite(loss), "grad_norm": _finite(grad_norm)}
                print_json(found | {"sequence": _sequence_facts(index, examples)})
            else:
                _print_sequence(trial, index, examples)
        log(
            f"dry run: one sequence forward and backward, loss {loss:.3f}, gradient norm "
            f"{grad_norm:.3f}; nothing was written"
        )


def _existing(directory: Path) -> Path:
    return next(each for each in (directory, *directory.absolute().parents) if each.exists())


def _first_sequence(trial: Trial) -> tuple[int, list[list[TextPart]]]:
    train, sequences = trial.recipe.train, trial.data.train
    ids = sample_ids(train.seed, 0, train.global_batch_size, sequences.num_sequences)
    index = int(ids[0])
    tokenizer = load_tokenizer(trial.data.tokenizer_file)
    return index, sequence_parts(sequences, index, tokenizer)


def _print_sequence(trial: Trial, index: int, examples: list[list[TextPart]]) -> None:
    length, count = trial.recipe.train.sequence_length, trial.data.train.num_sequences
    log(
        f"the first sequence that is trained on, {index + 1:,} of {count:,}"
        f"{' of the sample' if trial.is_sample else ''}, {length:,} tokens; + marks what the loss "
        "counts"
    )
    for line in sequence_lines(examples, length):
        print_result(line)


def _sequence_facts(index: int, examples: list[list[TextPart]]) -> dict[str, Any]:
    return {"index": index, "examples": [[asdict(part) for part in parts] for parts in examples]}


def _finite(number: float) -> float | None:
    """Return a number that JSON can hold."""
    return number if math.isfinite(number) else None


def _facts(trial: Trial, directory: Path, size: int, free: int, room: str | None) -> dict[str, Any]:
    recipe, context = trial.recipe, trial.context
    checks = (trial.memory.warning, trial.loss.warning, room)
    _, trained = count_parameters(context.model)
    return {
        "run": str(directory),
        "dataset": None if trial.is_sample else recipe.data_path,
        "parameters": parameter_count(context.model.config),
        "trained_parameters": trained,
        "vocab_size": context.model.config.vocab_size,
        "steps": recipe.total_steps,
        "tokens": recipe.total_steps * recipe.tokens_per_step,
        "train_sequences": None if trial.is_sample else trial.data.train.num_sequences,
        "ranks": trial.world.size,
        "strategy": context.parallel_dims.strategy,
        "dtype": str(context.dtype).removeprefix("torch."),
        "micro_batch_size": context.micro_batch_size,
        "memory_bytes": trial.memory.needed,
        "free_memory_bytes": trial.memory.free,
        "checkpoint_bytes": size,
        "free_disk_bytes": free,
        "first_loss": _finite(trial.loss.loss),
        "expected_loss": trial.loss.expected,
        "warnings": [each for each in checks if each is not None],
    }
