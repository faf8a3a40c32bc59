"""A plan as text for a person, and as JSON."""

from dataclasses import asdict
from typing import Any

from minigpt_cli.analysis.measure_steps import MeasuredSize, fastest
from minigpt_cli.analysis.picture import Ticks, draw_curve
from minigpt_cli.analysis.plan import Plan, PlannedModel
from minigpt_cli.analysis.planned_devices import USABLE
from minigpt_cli.core.console import counted
from minigpt_cli.core.memory import format_size
from minigpt_cli.core.text_table import text_table
from minigpt_cli.recipe import Recipe

_LEAST_WIDTH = 40  # of notes, in characters
_ROWS = 9  # of the schedule's table


def plan_as_json(plan: Plan, advice: list[str], sizes: list[MeasuredSize]) -> dict[str, Any]:
    """Return the plan as plain values: bytes, seconds, counts and shares."""
    best = fastest(sizes)
    return asdict(plan) | {
        "advice": advice,
        "measured": [asdict(each) for each in sizes],
        "fastest_micro_batch_size": None if best is None else best.micro_batch_size,
    }


def plan_as_text(
    plan: Plan, recipe: Recipe, advice: list[str], sizes: list[MeasuredSize], width: int
) -> str:
    """Return the plan for a terminal of ``width`` columns."""
    parts = [_summary(plan, recipe)]
    if plan.model is not None:
        parts.append(_model_text(plan.model))
        parts.append(_memory_text(plan, plan.model))
        parts.append(_disk_text(plan, plan.model))
    else:
        parts.append("Model\n" + _wrapped(f"not known: {plan.model_unknown}", width, "  "))
    parts.append(_time_text(plan, sizes))
    parts.append(f"Schedule: {recipe.schedule.name}\n{schedule_picture(plan, width)}")
    if advice:
        parts.append("Advice\n" + "\n".join(_wrapped(each, width) for each in advice))
    else:
        parts.append("Advice\n  none: the settings fit together")
    return "\n\n".join(parts)


def schedule_picture(plan: Plan, width: int) -> str:
    """Return the learning rate over the steps as a picture; a table where that can't be drawn."""
    steps, rates = zip(*plan.schedule, strict=True)
    if len(steps) < 2:
        return _schedule_table(plan)
    marks = [round(steps[-1] * share) for share in (0, 0.25, 0.5, 0.75, 1)]
    top = max(rates)
    x_ticks: Ticks = (marks, [f"{mark:,}" for mark in marks])
    y_ticks: Ticks = ([0, top / 2, top], ["0", f"{top / 2:.2g}", f"{top:.2g}"])
    return draw_curve(steps, rates, width, x_ticks, y_ticks) or _schedule_table(plan)


def _schedule_table(plan: Plan) -> str:
    last = len(plan.schedule) - 1
    picked = sorted({round(index * last / (_ROWS - 1)) for index in range(_ROWS)})
    rows = [[f"{plan.schedule[i][0]:,}", f"{plan.schedule[i][1]:.3g}"] for i in picked]
    return text_table(["step", "optimizer.lr"], rows)


def _summary(plan: Plan, recipe: Recipe) -> str:
    data, devices = plan.data, plan.devices
    where = devices.name or ""
    if devices.type == "cuda":
        where = f"{devices.count} x {where}" if where else counted(devices.count, "GPU")
    memory = "" if devices.memory is None else f", {format_size(devices.memory)}"
    kind = " free" if devices.type == "cpu" and devices.memory is not None else ""
    each = " each" if devices.count > 1 and devices.memory is not None else ""
    epochs = "not known before the dataset is made"
    if plan.epochs is not None and data.train_sequences is not None:
        about = "about " if data.is_packed else ""
        epochs = f"{plan.epochs:.3g} over {about}{data.train_sequences:,} sequences"
    source = "GPT-2's, assumed" if data.vocab_source == "assumed" else data.vocab_source
    vocabulary = f"{data.vocab_size:,} ({source})"
    lines = [
        ("device", f"{where}{memory}{kind}{each}, {devices.dtype}"),
        ("data", f"{recipe.data_path}" + ("" if data.train_tokens else " (not there yet)")),
        *([] if plan.model is None else [("vocabulary", vocabulary)]),
        (
            "steps",
            f"{plan.steps:,} of {plan.global_batch_size:,} x {plan.sequence_length:,} tokens "
            f"({_micro_batches(plan.accumulation)} of {plan.micro_batch_size:,} per device)",
        ),
        ("tokens", f"{plan.tokens:,}"),
        ("epochs", epochs),
    ]
    return f"Plan of {plan.name}\n" + _pairs(lines)


def _model_text(model: PlannedModel) -> str:
    lines = [(part, f"{count:>15,}") for part, count in model.parts.items()]
    lines.append(("all parameters", f"{model.parameters:>15,}"))
    if model.trained_parameters != model.parameters:
        lines.append(("trained", f"{model.trained_parameters:>15,}"))
    lines.append(("tokens per parameter", f"{model.tokens_per_parameter:>15.3g}"))
    lines.append(("FLOPs per token", f"{model.flops_per_token:>15.3g}"))
    lines.append(("FLOPs of the run", f"{model.total_flops:>15.3g}"))
    return f"Model: {model.family}\n" + _pairs(lines)


def _memory_text(plan: Plan, model: PlannedModel) -> str:
    on_cpu = plan.devices.type == "cpu"
    header = ["strategy", "weights", "grads", "optim.", "gathered", "activ.", "peak"]
    header += ["process", "recomp.", ""] if on_cpu else ["recomp.", ""]
    rows = []
    for each in model.strategies:
        memory = each.memory
        sizes = [
            memory.parameters, memory.gradients, memory.optimizer, memory.gathered,
            memory.activations, memory.peak,
        ]  # fmt: skip
        if on_cpu:
            sizes.append(each.needed)
        sizes.append(each.needed_recomputing)
        verdict = ""
        if each.fits is not None:
            verdicts = {
                "fits": each.fits, "select.": each.fits_selective, "recomp.": each.fits_recomputing
            }  # fmt: skip
            verdict = next((name for name, holds in verdicts.items() if holds), "too large")
        mark = "*" if each.is_chosen and len(model.strategies) > 1 else ""
        rows.append([each.strategy + mark, *map(_short_size, sizes), verdict])
    notes = []
    if len(model.strategies) > 1:
        if any(each.is_chosen for each in model.strategies):
            notes.append("* what the recipe's distributed.strategy means here")
        else:
            notes.append("what distributed.strategy=auto means depends on --gpu-memory")
    total = "process" if on_cpu else "peak"
    notes.append(f"recomp.: {total} with train.activation_checkpointing=true")
    if any(not each.fits and each.fits_selective for each in model.strategies):
        notes.append("select.: fits with train.activation_checkpointing=selective")
    if on_cpu:
        notes.append("process: peak, the heap's holes, which vary, and buffers; not torch itself")
    elif plan.devices.memory is None:
        notes.append("give --gpu-memory to see what fits")
    else:
        notes.append(f"fits: a peak of at most {USABLE:.0%} of the GPU's memory")
    table = text_table(header, rows, left=(0,))
    return "Memory per device\n" + "\n".join(f"  {line}" for line in [*table.splitlines(), *notes])


def _disk_text(plan: Plan, model: PlannedModel) -> str:
    lines = [
        ("checkpoint", format_size(model.checkpoint_bytes)),
        (
            "needed",
            f"{format_size(model.disk_bytes)}: up to {model.checkpoints_at_once:,} checkpoints at "
            "once, and final/",
        ),
    ]
    if model.host_copy_bytes and plan.devices.type == "cuda":
        lines.append(
            (
                "host memory",
                f"{format_size(model.host_copy_bytes)} per rank while a checkpoint is written",
            )
        )
    elif model.host_copy_bytes:
        lines.append(
            ("memory", f"{format_size(model.host_copy_bytes)} more while a checkpoint is written")
        )
    return "Disk\n" + _pairs(lines)


def _time_text(plan: Plan, sizes: list[MeasuredSize]) -> str:
    duration = plan.duration
    if duration is None:
        reason = (
            "the model isn't known"
            if plan.model is None
            else "this device's peak isn't known; --measure takes a few real steps"
        )
        text = f"Time\n  not known: {reason}"
    else:
        lines = [
            ("duration", format_duration(duration.seconds)),
            ("from", duration.source),
            ("tokens/s", f"{duration.tokens_per_second:,.0f}"),
        ]
        if sizes:
            mfu = "n/a" if duration.mfu is None else f"{duration.mfu:.1%}"
            lines.append(("MFU", mfu))
        lines.append(("not included", "evaluations, saves, and the start"))
        text = "Time\n" + _pairs(lines)
    if not sizes:
        return text
    rows = [
        [
            f"{each.micro_batch_size:,}",
            "" if each.seconds_per_step is None else f"{each.seconds_per_step:.3g}",
            "" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}",
            each.skipped or "",
        ]
        for each in sizes
    ]
    table = text_table(["micro-batch", "seconds/step", "tokens/s", ""], rows)
    text += "\n" + "\n".join(f"  {line}" for line in table.splitlines())
    if (best := fastest(sizes)) is not None:
        text += f"\n  fastest: train.micro_batch_size={best.micro_batch_size}"
    return text


def format_duration(seconds: float) -> str:
    """Return a duration for a person."""
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _short_size(count: int) -> str:
    return f"{count / 1e9:,.2f}G" if count >= 1e8 else f"{count / 1e6:,.1f}M"


def _pairs(lines: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in lines)


def _wrapped(text: str, width: int, mark: str = "  - ") -> str:
    import textwrap

    return textwrap.fill(
        text, max(width, _LEAST_WIDTH), initial_indent=mark, subsequent_indent=" " * len(mark),
        break_on_hyphens=False, break_long_words=False,
    )  # fmt: skip


def _micro_batches(count: int) -> str:
    return f"{count:,} micro-batch{'es' if count > 1 else ''}"
