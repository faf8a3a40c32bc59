"""incidents/: a JSON file per incident, with the reason and the data of skipped updates."""

import json
import math
import time
from typing import TYPE_CHECKING, Any

from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.core.files import write_atomically
from minigpt_cli.core.run_dir import INCIDENTS
from minigpt_cli.data.loader import Sequences
from minigpt_cli.data.order import sample_ids
from minigpt_cli.data.packing import PackedSequences
from minigpt_cli.train.guard_report import BadStep, GuardReport
from minigpt_cli.train.optimizer import muon_peak_lr
from minigpt_cli.train.run import Run
from minigpt_cli.train.schedule import lr_factor

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXT_LENGTH = 200  # characters of each sequence's text


def report_bad_steps(run: Run, state: RunState, report: GuardReport, ranks: list[int]) -> str:
    """Write one incident for all bad steps of a report.

    Args:
        run: its directory, recipe and data.
        state: the place in the data.
        report: with at least one bad step.
        ranks: those whose own part of the first bad step's loss was not finite. All ranks if no
            part was, since gradients are known only as their sum.

    Returns:
        The file's name in the run directory.

    Raises:
        OSError: it can't be written.
    """
    first, *others = (_describe(run, state, bad) for bad in report.steps)
    kind = "spike" if report.steps[0].is_finite else "nonfinite"
    return write_incident(
        run,
        kind,
        first["step"],
        state.data_offset,
        {"ranks": ranks, "bad_steps": report.bad} | first | {"others": others},
    )


def write_incident(
    run: Run, kind: str, step: int, data_offset: int, content: dict[str, Any]
) -> str:
    """Write one incident.

    Its name has step and data offset: so the same steps done again after a kill write the same
    files, and steps on other data after a rollback write new ones.

    Args:
        run: its directory.
        kind: spike, nonfinite or rollback.
        step: the first bad step.
        data_offset: the state's at that step.
        content: a JSON object without NaN.

    Returns:
        The file's name in the run directory.

    Raises:
        OSError: it can't be written.
    """
    shifted = f"-offset-{data_offset}" if data_offset else ""
    name = f"{INCIDENTS}/step-{step:08d}{shifted}-{kind}.json"
    content = {"kind": kind, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | content
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    file = run.directory / name
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, (text + "\n").encode())
    return name


def sequences_of_batch(
    sequences: Sequences,
    tokenizer: "Tokenizer",
    *,
    seed: int,
    position: int,
    global_batch_size: int,
) -> list[dict[str, Any]]:
    """Describe the sequences of one batch, in its order.

    Args:
        sequences: the training split.
        tokenizer: the run's.
        seed: of the data order.
        position: the batch's place in the data order, in steps.
        global_batch_size: sequences per step.

    Returns:
        For each sequence its number, its shard's file, the offset of its first token in the shard
        (it may reach into the next one), and the beginning of its text. For packed examples, the
        number and the beginning of each.
    """
    ids = sample_ids(seed, position, global_batch_size, sequences.num_sequences).tolist()

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(tokens[:TEXT_LENGTH], skip_special_tokens=False)[:TEXT_LENGTH]

    if isinstance(sequences, PackedSequences):
        return [
            {
                "window": row,
                "examples": [{"example": n, "text": text(t)} for n, t in sequences.documents(row)],
            }
            for row in ids
        ]
    found, length = [], sequences.sequence_length
    for row in ids:
        shard, offset = sequences.split.locate(row * length)
        tokens = sequences.split.slice(row * length, (row + 1) * length + 1).tolist()
        found.append({"window": row, "shard": shard, "offset": offset, "text": text(tokens)})
    return found


def _describe(run: Run, state: RunState, bad: BadStep) -> dict[str, Any]:
    """Return the numbers of a bad step and the data of its batch."""
    recipe, optimizer = run.recipe, run.recipe.optimizer
    position = bad.step - 1 + state.data_offset
    factor = lr_factor(recipe.schedule, recipe.total_steps, bad.step)
    has_scale, has_limits = not math.isnan(bad.loss_scale), math.isfinite(bad.loss_limit)
    return {
        "step": bad.step,
        "loss": _json_number(bad.loss),
        "grad_norm": _json_number(bad.grad_norm),
        "loss_limit": bad.loss_limit if has_limits else None,  # above it, a loss is a spike
        "grad_norm_limit": bad.grad_norm_limit if has_limits else None,
        "lr": optimizer.lr * factor,
        **({"muon_lr": muon_peak_lr(optimizer) * factor} if optimizer.name == "muon" else {}),
        "loss_scale": _json_number(bad.loss_scale) if has_scale else None,
        "data_position": position,
        "window_tokens": recipe.train.sequence_length + 1,
        "windows": sequences_of_batch(
            run.batches.sequences,
            run.prompts.tokenizer,
            seed=recipe.train.seed,
            position=position,
            global_batch_size=recipe.train.global_batch_size,
        ),
    }


def _json_number(value: float) -> float | str:
    """Return a number that JSON can't hold as "nan", "inf" or "-inf"; ``float`` reads these."""
    return value if math.isfinite(value) else str(value)
