"""A few real steps on this device: how fast each micro-batch size is."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from minigpt_cli.analysis.plan import (
    Duration,
    Plan,
    workload_on,
)
from minigpt_cli.analysis.plan_inputs import complete_from_base
from minigpt_cli.analysis.planned_devices import usable_memory
from minigpt_cli.core.console import log
from minigpt_cli.core.memory import is_out_of_memory
from minigpt_cli.data.loader import Batch
from minigpt_cli.distributed.parallel import copy_full_tensor
from minigpt_cli.distributed.world import start_world
from minigpt_cli.model.config import config_from_recipe
from minigpt_cli.model.device_memory import bytes_needed
from minigpt_cli.model.gpt import initialize_weights
from minigpt_cli.recipe import Recipe
from minigpt_cli.train.step import StepContext, train_step
from minigpt_cli.train.trainer import build_context, warm_up

_REPEATS = 3
_MOST_SIZES = 6


@dataclass(frozen=True)
class MeasuredSize:
    """One micro-batch size on this device.

    Attributes:
        seconds_per_step: of a whole optimizer step of one rank; None if it wasn't measured.
        tokens_per_second: of one device.
        mfu: None if the device's peak isn't known.
        skipped: why it wasn't measured.
    """

    micro_batch_size: int
    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    skipped: str | None = None


def candidate_sizes(per_rank: int, own: int) -> list[int]:
    """Return micro-batch sizes to try, smallest first: divisors of a rank's batch.

    Of many, the largest ones and the recipe's ``own``, which are the likely ones. ``own`` is left
    out where a rank's batch can't be divided by it: no such step exists.
    """
    divisors = [size for size in range(1, per_rank + 1) if per_rank % size == 0]
    doubled = [size for size in divisors if size & (size - 1) == 0]
    sizes = (doubled if len(doubled) >= _MOST_SIZES else divisors)[-_MOST_SIZES:]
    return sorted({*sizes, own}) if per_rank % own == 0 else sizes


def measure_steps(recipe: Recipe, plan: Plan) -> list[MeasuredSize]:
    """Time steps on random tokens for each micro-batch size that is predicted to fit this device.

    Args:
        recipe: as it was loaded.
        plan: for this machine's kind of device.
    """
    assert plan.model is not None
    world = start_world(deterministic=recipe.train.deterministic)
    recipe, _ = complete_from_base(recipe)
    micro = plan.micro_batch_size
    single = replace(
        recipe, train=replace(recipe.train, micro_batch_size=micro, global_batch_size=micro)
    )
    config = config_from_recipe(recipe, plan.data.vocab_size)
    context = build_context(single, plan.data.vocab_size, world)
    initialize_weights(context.model, recipe.train.seed, copy_full_tensor)
    per_rank = max(1, plan.global_batch_size // plan.devices.count)
    found = []
    failed: str | None = None
    for size in candidate_sizes(per_rank, plan.micro_batch_size):
        sized = replace(recipe, train=replace(recipe.train, micro_batch_size=size))
        needed = bytes_needed(config, workload_on(sized, plan.devices, "single"))
        usable = usable_memory(plan.devices)
        if failed is None and usable is not None and needed > usable:
            failed = "predicted not to fit"
        if failed is not None:
            found.append(MeasuredSize(size, skipped=failed))
            continue
        log(f"measuring micro-batches of {size}")
        try:
            seconds = _seconds_per_step(
                replace(context, micro_batch_size=size), plan.sequence_length, per_rank // size
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failed = "out of memory"
            found.append(MeasuredSize(size, skipped=failed))
            continue
        speed = per_rank // size * size * plan.sequence_length / seconds
        peak = plan.devices.peak_flops
        mfu = None if peak is None else speed * plan.model.flops_per_token / peak
        found.append(MeasuredSize(size, seconds, speed, mfu))
    return found


def fastest(sizes: list[MeasuredSize]) -> MeasuredSize | None:
    """Return the size with the most tokens per second; None if none could be measured."""
    return max(
        (each for each in sizes if each.tokens_per_second is not None),
        key=lambda each: each.tokens_per_second or 0.0,
        default=None,
    )


def measured_duration(plan: Plan, sizes: list[MeasuredSize]) -> Duration | None:
    """Return the duration with the recipe's own micro-batch size, else with the fastest one."""
    own = [each for each in sizes if each.micro_batch_size == plan.micro_batch_size]
    chosen = next((each for each in own if each.seconds_per_step is not None), fastest(sizes))
    if chosen is None or chosen.seconds_per_step is None or chosen.tokens_per_second is None:
        return None
    count = plan.devices.count
    source = f"measured here with micro-batches of {chosen.micro_batch_size}"
    if count > 1:
        source += f", times {count} devices, without what they send each other"
    return Duration(
        plan.steps * chosen.seconds_per_step,
        count * chosen.tokens_per_second,
        chosen.mfu,
        source,
    )


def _seconds_per_step(context: StepContext, length: int, accumulation: int) -> float:
    """Return the seconds of a step with ``accumulation`` micro-batches.

    A step of one and a step of two micro-batches are timed; every further one takes the difference.
    """
    warm_up(context, length)
    times = list(_timed(context, length, 1))
    one = statistics.median(times)
    if accumulation == 1:
        return one
    two = statistics.median(_timed(context, length, 2))
    return one + (accumulation - 1) * (two - one if two > one else two / 2)


def _timed(context: StepContext, length: int, micro_batches: int) -> Iterator[float]:
    device = context.parallel_dims.world.device
    shape = (micro_batches * context.micro_batch_size, length)
    generator = torch.Generator().manual_seed(context.seed)
    ids = torch.randint(context.model.config.vocab_size, shape, generator=generator).to(device)
    for step in range(_REPEATS + 1):
        began = time.perf_counter()
        # At a rate of 0: a model that learned these tokens by heart would compute with denormal
        # numbers, which are slow on a CPU.
        train_step(context, Batch(ids, ids, None), step, 0.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if step:  # the first one is unlike all others
            yield time.perf_counter() - began
