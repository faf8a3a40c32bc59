"""A plan of a run, by arithmetic: parameters, tokens, memory of each strategy, disk and time."""

from dataclasses import dataclass, replace

from minigpt_cli.analysis.plan_inputs import PlannedData, complete_from_base, planned_data
from minigpt_cli.analysis.planned_devices import PlannedDevices, usable_memory
from minigpt_cli.distributed.parallel import auto_strategy, training_state_bytes
from minigpt_cli.model.config import ModelConfig, config_from_recipe
from minigpt_cli.model.cost import (
    flops_per_token,
    parameters_by_part,
    peak_flops,
)
from minigpt_cli.model.device_memory import (
    Memory,
    bytes_needed,
    device_memory_needed,
    optimizer_elements,
)
from minigpt_cli.model.workload import Strategy, Workload, workload_of
from minigpt_cli.recipe import Recipe
from minigpt_cli.train.schedule import lr_factor

GPUS_PER_MACHINE = 8  # assumed for hsdp where the recipe has no shard_size
ASSUMED_MFU, ASSUMED_GPU = 0.4, "H100"
_POINTS = 200  # of the schedule


@dataclass(frozen=True)
class StrategyMemory:
    """What one strategy needs on a device.

    Attributes:
        needed: bytes to compare with the device's: of tensors on a GPU, of the process on a CPU.
        needed_selective: the same with ``train.activation_checkpointing = "selective"``.
        needed_recomputing: the same with ``train.activation_checkpointing = true``.
        fits: None if the device's memory isn't known.
        is_chosen: whether the recipe's ``distributed.strategy`` means this one.
    """

    strategy: Strategy
    shard_size: int | None
    memory: Memory
    needed: int
    needed_selective: int
    needed_recomputing: int
    fits: bool | None
    fits_selective: bool | None
    fits_recomputing: bool | None
    is_chosen: bool


@dataclass(frozen=True)
class PlannedModel:
    """The model and what it costs.

    Attributes:
        parts: parameters by part.
        tokens_per_parameter: trained tokens over all parameters.
        checkpoint_bytes: tensors of one checkpoint: weights and optimizer state.
        checkpoints_at_once: the most on the disk at a time, with the one that is being written.
        export_bytes: the weights in final/.
        disk_bytes: of all these.
        host_copy_bytes: copied into each machine's memory, per rank, while a save is written.
    """

    family: str
    parameters: int
    trained_parameters: int
    parts: dict[str, int]
    vocab_size: int
    flops_per_token: int
    total_flops: int
    tokens_per_parameter: float
    strategies: list[StrategyMemory]
    checkpoint_bytes: int
    checkpoints_at_once: int
    export_bytes: int
    disk_bytes: int
    host_copy_bytes: int


@dataclass(frozen=True)
class Duration:
    """How long training takes, without evaluations and saves.

    Attributes:
        source: where it comes from, in words.
    """

    seconds: float
    tokens_per_second: float
    mfu: float | None
    source: str


@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it starts."""

    name: str
    steps: int
    tokens: int
    global_batch_size: int
    sequence_length: int
    micro_batch_size: int
    accumulation: int
    epochs: float | None
    data: PlannedData
    devices: PlannedDevices
    model: PlannedModel | None
    model_unknown: str | None
    duration: Duration | None
    schedule: list[tuple[int, float]]


def make_plan(recipe: Recipe, devices: PlannedDevices, mfu: float | None = None) -> Plan:
    """Plan a run. Nothing is written, downloaded or trained.

    Args:
        recipe: as it was loaded.
        devices: where it is to run.
        mfu: the share of the peak that is reached; default: 0.4 on a GPU.

    Raises:
        UserError: the model's sizes don't fit together, or its base or data can't be read.
    """
    recipe, unknown = complete_from_base(recipe)
    data = planned_data(recipe)
    train, steps = recipe.train, recipe.total_steps
    tokens = steps * recipe.tokens_per_step
    work = workload_of(recipe, devices.count, devices.type, "single")
    sequences = data.train_sequences
    model = None if unknown else _planned_model(recipe, data, devices)
    every = max(1, steps // _POINTS)
    updates = sorted({1, recipe.schedule.warmup_steps, *range(1, steps + 1, every), steps} - {0})
    return Plan(
        name=recipe.name,
        steps=steps,
        tokens=tokens,
        global_batch_size=train.global_batch_size,
        sequence_length=train.sequence_length,
        micro_batch_size=work.micro_batch_size,
        accumulation=work.accumulation,
        epochs=steps * train.global_batch_size / sequences if sequences else None,
        data=data,
        devices=devices,
        model=model,
        model_unknown=unknown,
        duration=None if model is None else _duration(model, tokens, devices, mfu),
        schedule=[
            (step, recipe.optimizer.lr * lr_factor(recipe.schedule, steps, step))
            for step in updates
            if step <= steps
        ],
    )


def shard_size_of(recipe: Recipe) -> int:
    """Return the GPUs that share one copy of the model under hsdp."""
    return recipe.distributed.shard_size or GPUS_PER_MACHINE


def workload_on(recipe: Recipe, devices: PlannedDevices, strategy: Strategy) -> Workload:
    """Return the workload of a recipe on these devices."""
    return workload_of(
        recipe,
        devices.count,
        devices.type,
        strategy,
        shard_size=shard_size_of(recipe),
        compute_bytes=devices.compute_bytes,
    )


def _planned_model(recipe: Recipe, data: PlannedData, devices: PlannedDevices) -> PlannedModel:
    config = config_from_recipe(recipe, data.vocab_size)
    adapter = None if recipe.lora is None else recipe.lora.adapter
    parts = parameters_by_part(config, adapter)
    whole = sum(parts.values())
    trained = whole if adapter is None else parts["adapters"]
    per_token = flops_per_token(
        config, recipe.train.sequence_length, None if adapter is None else trained
    )
    tokens = recipe.total_steps * recipe.tokens_per_step
    full = 8 if devices.dtype == "fp64" else 4
    checkpoint = full * (trained + optimizer_elements(config, recipe.optimizer.name, 1, adapter))
    kept = recipe.checkpoint
    at_once = kept.keep_last + kept.keep_best + 1
    if kept.keep_every:
        at_once += recipe.total_steps // kept.keep_every
    export = full * trained
    return PlannedModel(
        family=config.family,
        parameters=whole,
        trained_parameters=trained,
        parts=parts,
        vocab_size=config.vocab_size,
        flops_per_token=per_token,
        total_flops=per_token * tokens,
        tokens_per_parameter=tokens / whole,
        strategies=_strategies(recipe, config, devices, training_state_bytes(whole, trained)),
        checkpoint_bytes=checkpoint,
        checkpoints_at_once=at_once,
        export_bytes=export,
        disk_bytes=at_once * checkpoint + export,
        host_copy_bytes=checkpoint // devices.count if kept.asynchronous else 0,
    )


def _strategies(
    recipe: Recipe, config: ModelConfig, devices: PlannedDevices, state_bytes: int
) -> list[StrategyMemory]:
    names: list[Strategy] = ["single"]
    chosen: str | None = "single"
    if devices.count > 1:
        names = ["ddp", "zero2", "fsdp"]
        chosen = recipe.distributed.strategy
        size = shard_size_of(recipe)
        if devices.count % size == 0 and (devices.count > size or chosen == "hsdp"):
            names.append("hsdp")
        if chosen == "auto":
            memory = devices.memory
            chosen = None if memory is None else auto_strategy(state_bytes, memory)
    usable = usable_memory(devices)
    found = []
    for name in names:
        work = workload_on(recipe, devices, name)
        needed, less, least = (
            bytes_needed(config, each)
            for each in (
                work,
                replace(work, activation_checkpointing="selective"),
                replace(work, activation_checkpointing=True),
            )
        )
        found.append(
            StrategyMemory(
                strategy=name,
                shard_size=work.shard_size,
                memory=device_memory_needed(config, work),
                needed=needed,
                needed_selective=less,
                needed_recomputing=least,
                fits=None if usable is None else needed <= usable,
                fits_selective=None if usable is None else less <= usable,
                fits_recomputing=None if usable is None else least <= usable,
                is_chosen=name == chosen,
            )
        )
    return found


def _duration(
    model: PlannedModel, tokens: int, devices: PlannedDevices, mfu: float | None
) -> Duration | None:
    peak, name = devices.peak_flops, devices.name
    if peak is None:
        if devices.type == "cpu" or devices.name is not None:
            return None
        name, peak = ASSUMED_GPU, peak_flops(ASSUMED_GPU)
        assert peak is not None
    share = ASSUMED_MFU if mfu is None else mfu
    speed = share * peak * devices.count / model.flops_per_token
    assumed = " (assumed)" if mfu is None else ""
    source = f"at {share:.0%} MFU{assumed} on {devices.count} x {name}"
    if devices.name is None:
        source += " (assumed; --gpu names another)"
    return Duration(tokens / speed, speed, share, source)
