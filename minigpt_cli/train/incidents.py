"""incidents/: why updates were called off and what was in their batches, one JSON file each."""

import json
import math
import time
from typing import TYPE_CHECKING, Any

from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.core.files import write_atomically
from minigpt_cli.data.loader import Sequences
from minigpt_cli.data.order import sample_ids
from minigpt_cli.data.packing import PackedSequences
from minigpt_cli.recipe import Recipe
from minigpt_cli.train.guard import BadStep, Seen
from minigpt_cli.train.run import Run
from minigpt_cli.train.schedule import lr_at

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TEXT = 200  # characters of each window's text


def report(run: Run, state: RunState, seen: Seen, ranks: list[int]) -> str:
    """Write what was bad since the host last looked; returns the file's name in the run directory.

    Args:
        ranks: those whose own share of the first bad step's loss was not finite; all of them where
            no share was, since gradients are known only as their sum.

    Raises:
        OSError: it can't be written.
    """
    first, *others = (_describe(run, state, bad) for bad in seen.steps)
    kind = "spike" if seen.steps[0].is_finite else "nonfinite"
    return write(
        run,
        kind,
        first["step"],
        state.data_offset,
        {"ranks": ranks, "bad_steps": seen.bad} | first | {"others": others},
    )


def write(run: Run, kind: str, step: int, data_offset: int, content: dict[str, Any]) -> str:
    """Write one incident. A step's name tells what data it had, so that the same steps done again
    (after a kill) write the same files and other ones (after a rollback) don't."""
    shifted = f"-offset-{data_offset}" if data_offset else ""
    name = f"incidents/step-{step:08d}{shifted}-{kind}.json"
    content = {"kind": kind, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z")} | content
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    file = run.directory / name
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, (text + "\n").encode())
    return name


def sequences_of_batch(
    rows: Sequences, tokenizer: "Tokenizer", *, seed: int, position: int, global_batch_size: int
) -> list[dict[str, Any]]:
    """The windows of one batch, in its order: number, shard's file, offset of the first token in
    it, and the beginning of the text. A window may reach into the next shard. Of packed examples,
    the number and the beginning of each.

    Args:
        position: the batch's place in the order of the data, in steps.
    """
    ids = sample_ids(seed, position, global_batch_size, rows.num_sequences).tolist()

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(tokens[:TEXT], skip_special_tokens=False)[:TEXT]

    if isinstance(rows, PackedSequences):
        return [
            {
                "window": row,
                "examples": [{"example": n, "text": text(t)} for n, t in rows.documents(row)],
            }
            for row in ids
        ]
    found, length = [], rows.sequence_length
    for row in ids:
        shard, offset = rows.split.locate(row * length)
        tokens = rows.split.slice(row * length, (row + 1) * length + 1).tolist()
        found.append({"window": row, "shard": shard, "offset": offset, "text": text(tokens)})
    return found


def _describe(run: Run, state: RunState, bad: BadStep) -> dict[str, Any]:
    recipe = run.recipe
    position = bad.step - 1 + state.data_offset
    scaled, limited = not math.isnan(bad.loss_scale), math.isfinite(bad.loss_limit)
    return {
        "step": bad.step,
        "loss": _number(bad.loss),
        "grad_norm": _number(bad.grad_norm),
        "loss_limit": bad.loss_limit if limited else None,  # above them it is a spike
        "grad_norm_limit": bad.grad_norm_limit if limited else None,
        "lr": lr_at(recipe.schedule, recipe.optimizer.lr, recipe.total_steps, bad.step),
        **({"muon_lr": _muon_lr(recipe, bad.step)} if recipe.optimizer.name == "muon" else {}),
        "loss_scale": _number(bad.loss_scale) if scaled else None,
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


def _muon_lr(recipe: Recipe, step: int) -> float:
    peak = recipe.optimizer.muon_lr or recipe.optimizer.lr
    return lr_at(recipe.schedule, peak, recipe.total_steps, step)


def _number(value: float) -> float | str:
    """JSON has no NaN: "nan", "inf" and "-inf", which ``float`` reads back."""
    return value if math.isfinite(value) else str(value)
