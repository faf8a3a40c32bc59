"""Changes between two processes of a run: settings, the dataset, the machine."""

from pathlib import Path
from typing import Any

from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.core.console import log, warn
from minigpt_cli.core.environment import environment_changes
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.faq import faq
from minigpt_cli.core.reading import read_json
from minigpt_cli.core.run_dir import ENVIRONMENT
from minigpt_cli.recipe import Recipe, changed_settings, setting_names

# Settings that shaped what was already trained: they change only if --allow-change names them.
CHANGED_BY_NAME = (
    "model.dropout",
    "train.seed",
    "train.global_batch_size",
    "train.sequence_length",
    "lora.alpha",
    "lora.dropout",
)
# Settings that never change: the saved tensors would not fit. (lora.base is compared by content.)
NEVER_CHANGED = (
    "model.",
    "optimizer.name",
    "lora.rank",
    "lora.target_modules",
    "lora.use_",
)


def check_changes(before: Recipe, after: Recipe, allowed: list[str]) -> None:
    """Log the changes of the command line; refuse those of settings that shaped the training.

    Args:
        before: the run's recipe.
        after: the same with the overrides.
        allowed: the keys that --allow-change names.

    Raises:
        UserError: a change isn't allowed.
    """
    known = {"data", *setting_names(after)}
    if unknown := [key for key in allowed if key not in known]:
        raise UserError(f"--allow-change {unknown[0]}: no such setting")
    never, refused = [], []
    for key, old, new in changed_settings(before, after):
        log(f"changed: {key} = {new} (was {old})")
        if key in CHANGED_BY_NAME:
            refused += [] if key in allowed else [key]
        elif key.startswith(NEVER_CHANGED):
            never.append(key)
    if never:
        raise UserError(
            f"{', '.join(never)} can't change within a run, because the saved tensors would not "
            "fit: start another run"
        )
    if refused:
        raise UserError(
            f"{', '.join(refused)}: the run was trained with the old value so far; to change it, "
            "add " + " ".join(f"--allow-change {key}" for key in refused)
        )


def check_dataset(
    recipe: Recipe, state: RunState, fingerprints: dict[str, Any], allow_changes: list[str]
) -> None:
    """Refuse a dataset other than the one trained on; note the new one in ``state``.

    Args:
        recipe: names the dataset.
        state: has the fingerprints of the old dataset.
        fingerprints: of the dataset that was opened.
        allow_changes: holds "data" if another dataset is allowed.

    Raises:
        UserError: it is another one.
    """
    for part, before in state.dataset.items():
        if fingerprints.get(part) != before and "data" not in allow_changes:
            raise UserError(
                f"{recipe.data_path}: its {part} is not that of the dataset this run was trained "
                "on; give that one with --set data.path=..., or add --allow-change data"
            )
    state.dataset = fingerprints


def check_base(recipe: Recipe, state: RunState, fingerprint: str | None) -> None:
    """Refuse a base model other than the one that the adapters were trained on.

    Args:
        recipe: names the base.
        state: has the fingerprint of the old base.
        fingerprint: of the base that was opened.

    Raises:
        UserError: it is another one.
    """
    if fingerprint != state.dataset.get("base"):
        raise UserError(
            f"{recipe.base}: is not the model that this run's adapters were trained on, whatever "
            "its name; give that one with --set lora.base=..."
        )


def warn_about_environment(directory: Path, now: dict[str, Any]) -> None:
    """Warn if results will differ in their bits, because the machine or the software changed.

    Args:
        directory: the run directory, with the last process's environment.json.
        now: this process's environment.
    """
    try:
        before = read_json(directory / ENVIRONMENT)
    except UserError:
        return
    if changes := environment_changes(before, now):
        warn(
            f"{', '.join(changes)}: results will not be bit-identical "
            f"{faq('differs-after-a-resume')}"
        )
