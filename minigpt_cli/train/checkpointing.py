"""Save and restore the whole content of a run's checkpoint."""

import time
from pathlib import Path

import torch
from torch import Tensor

from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.manifest import CheckpointManifest
from minigpt_cli.checkpoint.saver import SaveResult
from minigpt_cli.checkpoint.state import RunState, state_bytes
from minigpt_cli.checkpoint.tensors import load_tensors, tensors_of
from minigpt_cli.core.console import log, warn
from minigpt_cli.core.errors import Diverged, UserError
from minigpt_cli.core.faq import faq
from minigpt_cli.core.run_dir import AUXILIARY_FILES, RECIPE, STATE, TOKENIZER
from minigpt_cli.distributed.parallel import to_local
from minigpt_cli.recipe import dump_recipe
from minigpt_cli.train.guard_report import guard_to_json, restore_guard
from minigpt_cli.train.run import Run
from minigpt_cli.train.step import StepContext


def save_checkpoint(run: Run, state: RunState, *, must_succeed: bool = False) -> None:
    """Start to save a checkpoint, after the save before it has ended; every rank calls it.

    Training may go on when this returns. The save has ended by then if saves are not asynchronous,
    or if it ``must_succeed``.

    Args:
        run: its guard has no bad step that wasn't reported.
        state: saved with the tensors; the guard's and the scaler's fields are filled in.
        must_succeed: whether a failure ends the run.

    Raises:
        Diverged: weights or optimizer state are not finite.
        UserError: the checkpoint could not be written, and it ``must_succeed``.
    """
    context = run.context
    began = time.monotonic()
    finish_save(run)
    if (waited := time.monotonic() - began) >= 0.1:
        log(f"waited {waited:.1f} s for the save before this one")
    tensors = tensors_of(context.model, context.optimizers)
    if any(run.world.all_reduce_max(not all_finite(to_local(list(tensors.values()))))):
        raise Diverged(
            f"training diverged: weights or optimizer state are not finite at step {state.step}; "
            f"this step is not saved. {last_good_checkpoint(run)} Try a lower optimizer.lr, or "
            f"optimizer.clip_norm=1 {faq('loss-is-nan')}"
        )
    state.skipped = int(context.guard.overflows.item())
    state.guard = guard_to_json(context.guard, state.step)
    state.scaler = context.scaler.state_dict()
    if state.step > state.rollback_step and not state.guard.get("spikes_in_a_row"):
        state.rollbacks = 0  # the last rollback helped
    if run.metrics is not None:
        run.metrics.flush()
    files = {
        STATE: state_bytes(state),
        RECIPE: dump_recipe(run.recipe).encode(),
        TOKENIZER: run.tokenizer_json,
    }
    if run.auxiliary_files:
        files[AUXILIARY_FILES] = run.auxiliary_files.dump()
    val_loss = state.val_loss if state.evaluated_step == state.step else None
    run.saver.start(state.step, tensors, files, val_loss)
    if must_succeed or not run.recipe.checkpoint.asynchronous:
        finish_save(run, must_succeed)


def restore_checkpoint(
    context: StepContext, checkpoint: Path, manifest: CheckpointManifest, state: RunState
) -> None:
    """Restore model, optimizers, scaler and guard from a checkpoint.

    Args:
        context: changes in place.
        checkpoint: a verified checkpoint's directory.
        manifest: of the checkpoint.
        state: of the checkpoint, as ``read_state`` returned it.
    """
    world = context.parallel_dims.world
    load_tensors(checkpoint, manifest, context.model, context.optimizers, world)
    if state.scaler:
        context.scaler.load_state_dict(state.scaler)
    restore_guard(context.guard, state.guard, state.step, state.skipped)


def finish_save(run: Run, must_succeed: bool = False, is_last: bool = False) -> None:
    """Wait for the save that is running, and log its result; every rank calls it.

    Raises:
        UserError: it failed, and it ``must_succeed``.
    """
    log_save(run, run.saver.wait(), must_succeed, is_last)


def log_save(
    run: Run, saved: SaveResult | None, must_succeed: bool = False, is_last: bool = False
) -> None:
    """Log the result of a save.

    Args:
        run: whose display shows the checkpoint.
        saved: None if none has ended.
        must_succeed: whether a failure is an error rather than a warning.
        is_last: whether training has ended.

    Raises:
        UserError: it failed, and it ``must_succeed``.
    """
    if saved is None:
        return
    if saved.problem is None:
        run.display.saved(saved.step)
        log(f"saved {saved.path}")
        return
    problem = f"{saved.path}: the checkpoint could not be written: {saved.problem}"
    if must_succeed:
        raise UserError(
            f"{problem}; older checkpoints are untouched: free some space or repair the path, then "
            "run minigpt resume"
        )
    next_try = "training goes on and saves again at the next interval"
    warn(f"{problem}; {'trying once more' if is_last else next_try}")


def last_good_checkpoint(run: Run) -> str:
    """Return a sentence that names the newest checkpoint."""
    steps = store.list_steps(run.directory)
    return (
        f"The last good checkpoint is {steps[-1][1]}." if steps else "No checkpoint was saved yet."
    )


def all_finite(tensors: list[Tensor]) -> bool:
    """Return whether all elements are finite. Waits for the device.

    A finite gradient can still make weights and moments overflow, by a large learning rate or by
    its square.

    Args:
        tensors: this rank's part of each, perhaps empty.
    """
    # Minimum and maximum are both NaN if an element is.
    extremes = [torch.stack(torch.aminmax(t)).double() for t in tensors if t.numel()]
    return not extremes or bool(torch.cat(extremes).isfinite().all())
