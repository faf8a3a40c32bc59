"""state.json: a run's state apart from its tensors, such as the step and the best loss."""

import json
import math
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minigpt_cli.core.errors import Damaged, first_line
from minigpt_cli.core.reading import (
    MAX_BYTES,
    MAX_TOKENIZER_BYTES,
    build,
    read_json,
    read_text,
)
from minigpt_cli.core.run_dir import AUXILIARY_FILES, RECIPE, STATE, TOKENIZER


@dataclass
class RunState:
    """The state of a run. With the tensors, it determines the next step."""

    step: int = 0  # optimizer steps done: the position in the schedule
    data_offset: int = 0  # steps of data that rollbacks skipped; step + data_offset: the data's
    rollbacks: int = 0  # since the last checkpoint that was saved without spikes
    rollback_step: int = 0  # the step that the last rollback returned to
    tokens: int = 0  # tokens trained on
    evaluated_step: int = 0  # the step of the last evaluation
    val_loss: float | None = None  # at evaluated_step
    best_val_loss: float | None = None
    best_step: int | None = None  # of best_val_loss
    evaluations_since_best: int = 0
    skipped: int = 0  # fp16 updates skipped because of an overflow
    guard: dict[str, Any] = field(default_factory=dict)  # its history, see train/guard_report.py
    scaler: dict[str, Any] = field(default_factory=dict)  # of torch.amp.GradScaler
    dataset: dict[str, Any] = field(default_factory=dict)  # fingerprints: data, tokenizer, base


def state_bytes(state: RunState) -> bytes:
    """Return the content of state.json."""
    return (json.dumps(asdict(state), indent=2) + "\n").encode()


def read_state(checkpoint: Path) -> RunState:
    """Read state.json from a checkpoint's directory.

    Raises:
        Damaged: It is missing, or ``state_bytes`` can't have made it.
    """
    file = checkpoint / STATE
    try:
        state: RunState = build(RunState, read_json(file, Damaged))
    except ValueError as error:
        raise Damaged(f"{file}: can't be read: {error}") from None
    if not _is_guard_state(state.guard, state.step):
        raise Damaged(f"{file}: invalid guard: {state.guard!r:.80}")
    if state.scaler and not _is_scaler_state(state.scaler):
        raise Damaged(f"{file}: invalid scaler: {state.scaler!r:.80}")
    return state


def invalid_state(checkpoint: Path, step: int, files: Iterable[str]) -> list[str]:
    """Check that a checkpoint's small files can be parsed, whatever its manifest claims.

    Args:
        checkpoint: The directory of the files.
        step: The step that state.json must have.
        files: The names of the checkpoint's files.

    Returns:
        A line for each problem.
    """
    problems = []
    for name in sorted(_READERS.keys() & set(files)):
        try:
            content = _READERS[name](checkpoint / name)
        except Damaged as error:
            problems.append(str(error))
            continue
        if isinstance(content, RunState) and content.step != step:
            problems.append(f"{checkpoint / name}: is of step {content.step}, expected {step}")
    return problems


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(file, Damaged))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{file}: can't be read: {first_line(error)}") from None


_READERS: dict[str, Callable[[Path], Any]] = {
    RECIPE: _read_toml,
    TOKENIZER: partial(read_json, error=Damaged, limit=MAX_TOKENIZER_BYTES),
    AUXILIARY_FILES: partial(read_json, error=Damaged, limit=MAX_BYTES),
    STATE: lambda file: read_state(file.parent),
}


def _is_guard_state(guard: dict[str, Any], step: int) -> bool:
    """Whether train/guard_report.py can have saved this at ``step``."""
    skips, losses, norms = (guard.get(name, []) for name in ("skips", "losses", "grad_norms"))
    return (
        guard.keys() <= {"skips", "losses", "grad_norms", "spikes_in_a_row"}
        and all(isinstance(each, list) for each in (skips, losses, norms))
        and all(type(skip) is int and 0 < skip <= step for skip in skips)
        and len(losses) == len(norms)
        and all(type(n) is float and math.isfinite(n) for n in (*losses, *norms))
        and type(count := guard.get("spikes_in_a_row", 0)) is int
        and count >= 0
    )


def _is_scaler_state(scaler: dict[str, Any]) -> bool:
    """Whether it has the form of torch.amp.GradScaler's state."""
    return scaler.keys() == torch.amp.GradScaler("cpu").state_dict().keys() and all(
        type(value) in (int, float) and 0 <= value < 1 << 63 for value in scaler.values()
    )
