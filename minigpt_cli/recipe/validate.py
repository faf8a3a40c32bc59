"""Checks of a recipe beyond its types: ranges, and settings that contradict each other."""

import dataclasses
import math
from collections.abc import Iterator
from typing import get_args

from minigpt_cli.recipe.schema import DataTokenizer, Range, Recipe


def find_problems(recipe: Recipe) -> list[str]:
    """Return one line for each contradiction between settings; empty when all is well.

    Args:
        recipe: every value has the right type already.
    """
    problems = [
        *_base_problems(recipe),
        *_length_problems(recipe),
        *_data_problems(recipe),
    ]
    if recipe.precision.tf32 and recipe.precision.dtype != "fp32":
        problems.append(
            f"[precision] tf32 is for dtype = fp32, not {recipe.precision.dtype}: set tf32 = false"
        )
    trackers = recipe.log.trackers
    problems += [
        f"[log] trackers names {name} twice" for name in {*trackers} if trackers.count(name) > 1
    ]
    steps, warmup = recipe.train.steps or recipe.train.tokens, recipe.schedule.warmup_steps
    sizes = (steps or 0, recipe.train.global_batch_size, recipe.train.sequence_length)
    if not problems and min(sizes) > 0 and warmup > recipe.total_steps:
        problems.append(
            f"[schedule] warmup_steps {warmup} is more than the {recipe.total_steps} steps of the "
            "run"
        )
    return problems


def out_of_range(section: type, values: object) -> Iterator[tuple[str, str]]:
    """Compare numbers with the ``Range`` of their setting.

    Args:
        section: a section's class, for the ranges.
        values: has an attribute for each setting of the section that has a range.

    Yields:
        (setting, problem) for each number that is out of its range.
    """
    for field in dataclasses.fields(section):
        allowed: Range | None = field.metadata.get("range")
        if allowed is None:
            continue
        value = getattr(values, field.name)
        several = isinstance(value, tuple)
        for index, number in enumerate(value if several else (value,)):
            if number is not None and number not in allowed:
                kind = "an integer" if int in (field.type, *get_args(field.type)) else "a number"
                if isinstance(number, float) and not math.isfinite(number):
                    kind = "a finite number"
                item = f"item {index}: " if several else ""
                yield field.name, f"{item}expected {kind} {allowed}, got {number}"


def _base_problems(recipe: Recipe) -> Iterator[str]:
    """Exactly one place says where the weights come from."""
    if recipe.base == "":
        yield "[lora] base and [model] init_from must not be empty"
    if recipe.lora is not None and recipe.model.init_from is not None:
        yield "[model] init_from and [lora] base both name the model to start from: keep one"
    elif recipe.lora is None and recipe.model.init_from is None:
        for name in ("family", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            if getattr(recipe.model, name) is None:
                yield f"[model] {name} is missing"
    if recipe.lora is not None and not recipe.lora.target_modules:
        yield "[lora] target_modules must not be empty"


def _length_problems(recipe: Recipe) -> Iterator[str]:
    """Steps, batches, positions and milestones fit together."""
    train, schedule = recipe.train, recipe.schedule
    if (train.steps is None) == (train.tokens is None):
        yield "[train] give the length once, as steps or as tokens"
    micro = train.micro_batch_size
    if micro and micro > 0 and train.global_batch_size % micro:
        yield (
            f"[train] global_batch_size {train.global_batch_size} is not a multiple of "
            f"micro_batch_size {micro}"
        )
    positions = recipe.model.max_position_embeddings
    if positions is not None and positions < train.sequence_length:
        yield (
            f"[train] sequence_length {train.sequence_length} is longer than [model] "
            f"max_position_embeddings {positions}"
        )
    if (schedule.name == "step") != bool(schedule.milestones):
        yield "[schedule] milestones: name = step needs them, other schedules have none"


def _data_problems(recipe: Recipe) -> Iterator[str]:
    """The dataset exists or can be made."""
    source, given = recipe.data.source, recipe.data.tokenizer
    if source is None:
        if recipe.data.path is None:
            yield "[data] path (a token dataset) or [data.source] (its text) is missing"
        return
    if source.kind != "python-stdlib" and not source.path:
        yield f"[data.source] kind {source.kind} needs a path"
    if source.format == "instructions":
        if source.kind not in ("jsonl", "parquet", "huggingface"):
            yield (
                "[data.source] format instructions needs kind jsonl, parquet or huggingface, "
                f"not {source.kind}"
            )
        if given is not None and given.train_vocab is not None:
            yield "[data.tokenizer] format instructions needs an existing tokenizer: give path"
    elif source.chat_template is not None:
        yield "[data.source] chat_template is for format instructions only"
    tokenizer = given or DataTokenizer()
    if recipe.base is not None and tokenizer.train_vocab is not None:
        yield (
            "[data.tokenizer] train_vocab is not allowed with a base model: its tokenizer is used"
        )
    base_brings_it = given is None and recipe.base is not None
    if not base_brings_it and (tokenizer.path is None) == (tokenizer.train_vocab is None):
        yield "[data.tokenizer] give path or train_vocab"
