"""What may change between a run's processes: settings, the dataset, the machine."""

import json
import platform
from typing import Any

import torch

import minigpt_cli
from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.core.console import log, warn
from minigpt_cli.core.errors import UserError
from minigpt_cli.distributed.device import device_name
from minigpt_cli.recipe import Recipe, changed_settings, setting_names
from minigpt_cli.train.run import Run

# What a run has already been shaped by: ``resume`` changes these only if told to by name ...
CHANGED_BY_NAME = (
    "model.dropout",
    "train.seed",
    "train.global_batch_size",
    "train.sequence_length",
    "lora.alpha",
    "lora.dropout",
)
# ... and these never: the saved tensors would not fit. (Another lora.base is compared by content.)
NEVER_CHANGED = (
    "model.",
    "optimizer.name",
    "lora.rank",
    "lora.target_modules",
    "lora.use_",
)


def check_changes(old: Recipe, new: Recipe, allowed: list[str]) -> None:
    """Print what the command line changes; refuse what would alter what was already trained."""
    known = {"data", *setting_names(new)}
    if unknown := [key for key in allowed if key not in known]:
        raise UserError(f"--allow-change {unknown[0]}: no such setting")
    never, refused = [], []
    for key, before, after in changed_settings(old, new):
        log(f"changed: {key} = {after} (was {before})")
        if key in CHANGED_BY_NAME:
            refused += [] if key in allowed else [key]
        elif key.startswith(NEVER_CHANGED):
            never.append(key)
    if never:
        raise UserError(
            f"{', '.join(never)} can't change within a run, whose saved tensors would not fit: "
            "start another run"
        )
    if refused:
        raise UserError(
            f"{', '.join(refused)} shaped what was already trained; to change it all the same, "
            "add " + " ".join(f"--allow-change {key}" for key in refused)
        )


def check_dataset(
    recipe: Recipe, state: RunState, fresh: RunState, allow_changes: list[str]
) -> None:
    """Refuse another dataset than the one trained on."""
    for what, before in state.dataset.items():
        if fresh.dataset[what] != before and "data" not in allow_changes:
            raise UserError(
                f"{recipe.data_path}: its {what} is not that of the dataset this run was trained "
                "on; give that one with --set data.path=..., or add --allow-change data"
            )
    state.dataset = fresh.dataset


def check_base(recipe: Recipe, state: RunState, fingerprint: str | None) -> None:
    """Refuse another base than the one that the adapters were trained on."""
    if fingerprint != state.dataset.get("base"):
        raise UserError(
            f"{recipe.base}: is not the model that this run's adapters were trained on, whatever "
            "its name; give that one with --set lora.base=..."
        )


def environment(run: Run) -> dict[str, Any]:
    device = run.world.device
    return {
        "minigpt": minigpt_cli.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "device_type": device.type,
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "computing_dtype": str(run.context.dtype).removeprefix("torch."),
        "ranks": run.world.size,
        "strategy": run.context.parallel_dims.strategy,
    }


def warn_of_another_machine(run: Run) -> None:
    """Bit-identity is promised for the same device, threads and torch only."""
    try:
        before = json.loads((run.directory / "environment.json").read_text())
    except (OSError, ValueError):
        return
    now = environment(run)
    changed = [
        f"{key} {before.get(key)} -> {now[key]}"
        for key in ("torch", "device", "threads", "computing_dtype", "ranks", "strategy")
        if before.get(key) != now[key]
    ]
    if changed:
        warn(f"goes on with another {', '.join(changed)}: equal within rounding, not bit for bit")
