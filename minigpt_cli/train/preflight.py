"""Checks before the first step, in seconds: memory, room on the disk, the loss.

A start that can't work is refused elsewhere (start_checks.py). What looks wrong here is a warning
that names the settings to look at, and training begins.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minigpt_cli.checkpoint.tensors import bytes_of, tensors_of
from minigpt_cli.core.console import counted, log, warn
from minigpt_cli.core.faq import faq
from minigpt_cli.core.memory import available_memory, format_size
from minigpt_cli.data.loader import Sequences
from minigpt_cli.data.order import sample_ids
from minigpt_cli.data.sequences import TrainingData
from minigpt_cli.evaluate.loss import evaluate, fixed_sequences, sequence_batches
from minigpt_cli.huggingface.base_model import BaseModel
from minigpt_cli.model.device_memory import bytes_needed
from minigpt_cli.model.workload import workload_of
from minigpt_cli.recipe import Recipe
from minigpt_cli.train.base_loss import base_loss
from minigpt_cli.train.step import StepContext

SEQUENCES = 8  # that the loss is computed on
TOLERANCE = 0.1  # of the expected loss, and of the predicted memory


@dataclass(frozen=True)
class MemoryCheck:
    """What a rank needs at its peak, and what is free; of the rank with the least to spare.

    Attributes:
        needed: bytes, by arithmetic: of tensors on a GPU; of the process on a CPU, with the copy
            of a checkpoint that is being saved.
        free: bytes; None if the system doesn't say.
        warning: None if it fits.
    """

    needed: int
    free: int | None
    warning: str | None = None


@dataclass(frozen=True)
class LossCheck:
    """The loss before any update, and what it should be.

    Attributes:
        loss: nats per token.
        expected: ln(vocabulary), or the base model's own loss; None if that wasn't computed.
        warning: None if they agree.
    """

    loss: float
    expected: float | None
    warning: str | None = None


def check_memory(
    recipe: Recipe, context: StepContext, free: int | None, packed: bool = False
) -> MemoryCheck:
    """Compare the memory that training needs with what is free, and warn; every rank calls it.

    Args:
        recipe: the recipe.
        context: just built: on a CPU nothing has used its memory yet.
        free: of ``free_memory``, before the context was built.
        packed: whether sequences hold several examples.

    Returns:
        The result for the rank with the least to spare, the same on every rank.
    """
    found = _compare_memory(recipe, context, free, packed)
    if found.warning is not None:
        warn(found.warning)
    return found


def _compare_memory(
    recipe: Recipe, context: StepContext, free: int | None, packed: bool
) -> MemoryCheck:
    world = context.parallel_dims.world
    needed, copy = predicted_memory(recipe, context, packed), saved_copy_bytes(recipe, context)
    on_cpu = world.device.type == "cpu"
    if on_cpu:
        needed += copy
    found = world.all_gather_json((needed, free), tuple[int, int | None])
    known = [(least - most, rank) for rank, (most, least) in enumerate(found) if least is not None]
    if not known:
        return MemoryCheck(needed, None)
    _, rank = min(known)
    needed, free = found[rank]
    assert free is not None
    if needed > free:
        return MemoryCheck(
            needed, free, _memory_warning(recipe, context, (needed, free, copy), rank)
        )
    host, copies = available_memory(), copy * world.local_size
    if any(world.all_reduce_max(not on_cpu and host is not None and host < copies)):
        warning = (
            f"a save copies {format_size(copies)} from the GPUs into this machine's memory, which "
            "has less free: set checkpoint.asynchronous=false"
        )
        return MemoryCheck(needed, free, warning)
    return MemoryCheck(needed, free)


def predicted_memory(recipe: Recipe, context: StepContext, packed: bool = False) -> int:
    """Return the bytes that this rank needs at the peak of a step, by arithmetic.

    On a GPU those of its tensors, on a CPU those of the process.

    Args:
        recipe: the recipe.
        context: model, strategy and dtype.
        packed: whether sequences hold several examples.
    """
    dims = context.parallel_dims
    workload = workload_of(
        recipe,
        dims.world.size,
        dims.world.device.type,
        dims.strategy,  # type: ignore[arg-type]
        shard_size=dims.mesh["shard"].size() if dims.strategy == "hsdp" and dims.mesh else None,
        compute_bytes=context.dtype.itemsize,
        packed=packed,
    )
    return bytes_needed(context.model.config, workload)


def saved_copy_bytes(recipe: Recipe, context: StepContext) -> int:
    """Return the bytes of this rank's copy while an asynchronous save is written."""
    if not recipe.checkpoint.asynchronous:
        return 0
    return checkpoint_bytes(context) // context.parallel_dims.world.size


def checkpoint_bytes(context: StepContext) -> int:
    """Return the bytes of a whole checkpoint's tensors."""
    return bytes_of(tensors_of(context.model, context.optimizers))


def _memory_warning(
    recipe: Recipe, context: StepContext, sizes: tuple[int, int, int], rank: int
) -> str:
    """Name what is missing and the settings that need less; ``sizes``: needed, free, the copy."""
    world, (needed, free, copy) = context.parallel_dims.world, sizes
    on_gpu, recomputing = world.device.type == "cuda", recipe.train.activation_checkpointing
    ways = {
        "a smaller train.micro_batch_size": context.micro_batch_size > 1,
        "train.activation_checkpointing=selective": not recomputing,
        "train.activation_checkpointing=true": recomputing is not True,
        "precision.dtype=bf16": context.dtype.itemsize > 2,
        "checkpoint.asynchronous=false": not on_gpu and 4 * copy > needed - free,
        "distributed.strategy=fsdp": context.parallel_dims.strategy == "ddp",
        "a smaller model": True,
    }
    who = f"rank {rank} needs" if world.size > 1 else "training needs"
    share = " for each rank" if world.local_size > 1 and not on_gpu else ""
    return (
        f"{who} about {format_size(needed)} of {'GPU memory' if on_gpu else 'memory'}, and "
        f"{format_size(free)} are free{share}: it may end out of memory. What needs less: "
        f"{', '.join(way for way, helps in ways.items() if helps)} {faq('out-of-memory')}"
    )


def check_loss(
    recipe: Recipe, context: StepContext, data: TrainingData, base: BaseModel | None
) -> LossCheck:
    """Compare the loss before any update with what it should be; every rank calls it.

    Nothing that training depends on changes: no gradient, no random number, no batch of the loader.

    Args:
        recipe: the recipe.
        context: with weights, before the first step.
        data: of the recipe.
        base: the model that the weights come from; None: they are random.
    """
    if base is None:
        count = data.train.num_sequences
        ids = sample_ids(recipe.train.seed, 0, recipe.train.global_batch_size, count)[:SEQUENCES]
        loss = _model_loss(context, data.train, ids)
        return compare_with_guess(loss, context.model.config.vocab_size)
    sequences = data.train if data.val is None else data.val
    split = "training" if data.val is None else "validation"
    ids = fixed_sequences(sequences.num_sequences, SEQUENCES)
    world = context.parallel_dims.world
    loss = _model_loss(context, sequences, ids)
    own = world.run_on_rank0(
        lambda: base_loss(base, sequences.gather(ids), world.device), float | None
    )
    return compare_with_base(
        loss, own, context.model.config.vocab_size, counted(len(ids), f"{split} sequence")
    )


def compare_with_guess(loss: float, vocab_size: int) -> LossCheck:
    """Compare a new model's loss with that of a uniform guess, ln(vocab_size)."""
    expected = math.log(vocab_size)
    if math.isfinite(loss) and abs(loss - expected) <= TOLERANCE * expected:
        return LossCheck(loss, expected)
    return LossCheck(
        loss,
        expected,
        f"the loss before any update is {loss:.3f}; a new model's should be within 10% of "
        f"ln({vocab_size}) = {expected:.3f}. Look at model.initializer_range (too large for this "
        f"model.hidden_size?) and at precision.dtype {faq('loss-is-stuck')}",
    )


def compare_with_base(loss: float, own: float | None, vocab_size: int, which: str) -> LossCheck:
    """Compare a model's loss before any update with that of its base model.

    Args:
        loss: nats per token, of the model as it is trained.
        own: the base's; None if it wasn't computed.
        vocab_size: a uniform guess has a loss of ln(vocab_size).
        which: the sequences, for messages: "8 validation sequences".
    """
    guess, known = math.log(vocab_size), loss if own is None else own
    if own is not None and not abs(loss - own) <= max(TOLERANCE * own, 0.05):
        return LossCheck(
            loss,
            own,
            f"the loss before any update is {loss:.3f} on {which}, and the base's own "
            f"is {own:.3f}, in float32 and without adapters: look at precision.dtype (fp16 "
            f"overflows in many models that were trained in bf16) {faq('loss-is-stuck')}",
        )
    if not known < (1 - TOLERANCE) * guess:
        return LossCheck(
            loss,
            own,
            f"the base model's loss is {known:.3f} on {which}; a guess has "
            f"ln({vocab_size}) = {guess:.3f}. Look at the base (is it trained, and the right "
            "one?), at the text's language, and for chats at data.source.chat_template "
            f"{faq('loss-is-stuck')}",
        )
    return LossCheck(loss, own)


def _model_loss(context: StepContext, sequences: Sequences, ids: NDArray[np.int64]) -> float:
    world = context.parallel_dims.world
    at_once = min(context.micro_batch_size, -(-len(ids) // world.size))
    result = evaluate(
        context.model,
        sequence_batches(sequences, ids, at_once, world.rank, world.size),
        dtype=context.dtype,
        token_bytes=None,
        bytes_per_token=0.0,
        world=world,
    )
    assert result is not None
    return result.loss


def report_preflight(memory: MemoryCheck, loss: LossCheck | None, has_base: bool) -> None:
    """Log what was found in a line, after the loss's warning; ``check_memory`` gave its own."""
    parts = []
    if loss is not None:
        if loss.warning is not None:
            warn(loss.warning)
        source = "the base's own" if has_base else "ln of the vocabulary"
        known = "not computed" if loss.expected is None else f"{loss.expected:.3f}"
        parts.append(f"loss {loss.loss:.3f} ({source}: {known})")
    free = "" if memory.free is None else f" of {format_size(memory.free)} free"
    parts.append(f"memory about {format_size(memory.needed)}{free}")
    log(f"before the first step: {', '.join(parts)}")
