"""``minigpt plan``."""

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from minigpt_cli.commands.options import Debug, Json, Overrides, Version, option
from minigpt_cli.core.console import print_json, print_result, printable, terminal_width
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.signals import nothing_is_saved

if TYPE_CHECKING:
    from minigpt_cli.analysis.planned_devices import PlannedDevices
    from minigpt_cli.recipe import Recipe

EXAMPLE = "minigpt plan recipes/tiny.toml --measure"

DEVICES, TIME = "Devices", "Time"
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

Gpus = Annotated[
    int | None,
    option("--gpus", "N", "Plan for N GPUs; default: this machine's device.", DEVICES, min=1),
]
GpuMemory = Annotated[
    str | None,
    option("--gpu-memory", "SIZE", "Memory of a GPU, as 80GB; default: this machine's.", DEVICES),
]
Gpu = Annotated[
    str | None,
    option("--gpu", "NAME", "The kind of GPU, as H100, for its speed.", DEVICES),
]
Mfu = Annotated[
    float | None,
    option(
        "--mfu", "SHARE", "Share of the GPUs' peak that is reached; default: 0.4.", TIME,
        min=0.001, max=1.0,
    ),
]  # fmt: skip
Measure = Annotated[
    bool,
    option("--measure", "", "Take a few real steps here, with several micro-batch sizes.", TIME),
]


def plan_command(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; see recipes/.")],
    overrides: Overrides = None,
    gpus: Gpus = None,
    gpu_memory: GpuMemory = None,
    gpu: Gpu = None,
    measure: Measure = False,
    mfu: Mfu = None,
    as_json: Json = False,
    version: Version = False,
    debug: Debug = False,
) -> None:
    """Show what a run needs, before it starts.

    Parameters, tokens, memory of each strategy, disk, time, the schedule, and what makes no sense.
    Nothing is written or downloaded.
    """
    nothing_is_saved()
    if measure and mfu is not None:
        raise UserError("--measure and --mfu can't be combined: give one of them")
    from minigpt_cli.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    from minigpt_cli.analysis.plan import make_plan
    from minigpt_cli.analysis.plan_advice import find_advice
    from minigpt_cli.analysis.plan_report import plan_as_json, plan_as_text

    devices = _devices(loaded, gpus, _parse_size(gpu_memory), gpu)
    plan = make_plan(loaded, devices, mfu)
    sizes = []
    if measure:
        from minigpt_cli.analysis.measure_steps import measure_steps, measured_duration

        _check_measurable(plan.model_unknown, devices)
        sizes = measure_steps(loaded, plan)
        plan = replace(plan, duration=measured_duration(plan, sizes))
    advice = find_advice(plan, loaded)
    if as_json:
        print_json(plan_as_json(plan, advice, sizes))
        return
    width = terminal_width() or 80
    print_result(printable(plan_as_text(plan, loaded, advice, sizes, width), keep="\n"))


def _devices(
    recipe: "Recipe", gpus: int | None, memory: int | None, name: str | None
) -> "PlannedDevices":
    from minigpt_cli.analysis.planned_devices import gpu_devices, local_devices
    from minigpt_cli.model.cost import PEAK_FLOPS, peak_flops

    if gpus is None and memory is None and name is None:
        return local_devices(recipe)
    if name is not None and peak_flops(name) is None:
        raise UserError(f"--gpu {name}: not a known GPU; these are: {', '.join(PEAK_FLOPS)}")
    return gpu_devices(recipe, gpus or 1, memory, name)


def _check_measurable(model_unknown: str | None, devices: "PlannedDevices") -> None:
    import torch

    if model_unknown is not None:
        raise UserError(f"--measure: {model_unknown}")
    if devices.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--measure: this machine has no GPU; leave out --measure, or --gpus, --gpu-memory and "
            "--gpu to measure on its CPU"
        )


def _parse_size(text: str | None) -> int | None:
    """Return the bytes of a size such as 80GB or 79.6GiB.

    Raises:
        UserError: it is no size.
    """
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([MGT]i?)B?\s*", text, re.IGNORECASE)
    size = 0
    if match is not None:
        prefix = match[2][0].upper() + ("i" if len(match[2]) > 1 else "")
        size = round(float(match[1]) * _UNITS[f"{prefix}B"])
    if size < 1:
        raise UserError(f"--gpu-memory {text:.40}: expected a size such as 80GB or 24GiB")
    return size
