"""The few numbers that are saved beside the tensors: state.json."""

import json
import math
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch

from minigpt_cli.core.errors import Damaged

STATE_FILE = "state.json"


@dataclass
class RunState:
    """Where a run stands; with the tensors, all that the next step depends on."""

    step: int = 0  # steps done: the place in the schedule and, with data_offset, in the data
    data_offset: int = 0  # steps of data that rollbacks have passed over
    rollbacks: int = 0  # since the last checkpoint of an ordinary step
    rollback_step: int = 0  # the step that the last of them went back to
    tokens: int = 0  # tokens trained on
    evaluated_step: int = 0  # the step of the last evaluation
    val_loss: float | None = None  # at that step
    best_val_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    skipped: int = 0  # fp16 updates skipped
    guard: dict[str, Any] = field(default_factory=dict)  # the steps it judges the next ones by
    scaler: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)  # fingerprints of what it trains on


def invalid_state(directory: Path, step: int, files: Iterable[str]) -> list[str]:
    """Which of the small ``files`` can't be what minigpt writes, whoever vouches for them."""
    problems = []
    parsers = {
        "recipe.toml": tomllib.loads,
        "tokenizer.json": json.loads,
        "huggingface.json": json.loads,
    }
    for name, parse in parsers.items():
        try:
            if name in files:
                parse((directory / name).read_text())
        except (OSError, ValueError, RecursionError) as error:
            problems.append(f"{directory / name}: can't be read: {error}")
    if STATE_FILE in files:
        try:
            if (found := read_state(directory).step) != step:
                problems.append(f"{directory / STATE_FILE}: is of step {found}")
        except Damaged as error:
            problems.append(str(error))
    return problems


def state_bytes(state: RunState) -> bytes:
    """What state.json holds."""
    return (json.dumps(asdict(state), indent=2) + "\n").encode()


def read_state(directory: Path) -> RunState:
    """The state that a checkpoint holds.

    Raises:
        Damaged: it can't be what ``state_bytes`` gave.
    """
    file = directory / STATE_FILE
    try:
        state = RunState(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise Damaged(f"{file}: can't be read: {error}") from None
    for name, hint in get_type_hints(RunState).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) else (get_origin(hint) or hint,)
        value = getattr(state, name)
        if type(value) not in kinds or (isinstance(value, int | float) and not value >= 0):
            raise Damaged(f"{file}: {name} can't be {value!r}")
    if not _is_of_a_guard(state.guard, state.step):
        raise Damaged(f"{file}: guard can't be {state.guard!r}")
    if state.scaler and not _is_of_a_scaler(state.scaler):
        raise Damaged(f"{file}: scaler can't be {state.scaler!r}")
    return state


def _is_of_a_guard(kept: dict[str, Any], step: int) -> bool:
    """Whether train/guard.py can have left this at ``step``."""
    skips, losses, norms = (kept.get(name, []) for name in ("skips", "losses", "grad_norms"))
    return (
        kept.keys() <= {"skips", "losses", "grad_norms", "spikes_in_a_row"}
        and all(isinstance(each, list) for each in (skips, losses, norms))
        and all(type(skip) is int and 0 < skip <= step for skip in skips)
        and len(losses) == len(norms)
        and all(isinstance(n, int | float) and math.isfinite(n) for n in (*losses, *norms))
        and type(count := kept.get("spikes_in_a_row", 0)) is int
        and count >= 0
    )


def _is_of_a_scaler(kept: dict[str, Any]) -> bool:
    """Whether torch.amp.GradScaler can have given this."""
    return kept.keys() == torch.amp.GradScaler("cpu").state_dict().keys() and all(
        isinstance(value, int | float) and 0 <= value < math.inf for value in kept.values()
    )
