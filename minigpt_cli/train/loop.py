"""The only training loop. One pass is one optimizer step."""

import signal
import time
from collections.abc import Callable

from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.core.console import log
from minigpt_cli.core.errors import Stopped
from minigpt_cli.recipe import Recipe
from minigpt_cli.train.checkpointing import finish_save, log_save, save_checkpoint
from minigpt_cli.train.evaluation import evaluate_run, is_evaluation_due
from minigpt_cli.train.finish import write_final
from minigpt_cli.train.guard_report import read_guard
from minigpt_cli.train.log_step import Clock, StepLog
from minigpt_cli.train.rollback import handle_bad_steps
from minigpt_cli.train.run import Run
from minigpt_cli.train.schedule import lr_factor
from minigpt_cli.train.step import train_step
from minigpt_cli.train.stop import StopRequest


def fit(run: Run, state: RunState) -> None:
    """Train from ``state`` to the end of the recipe, and export the model to final/.

    Args:
        run: of ``start_run`` or ``resume_run``; it is closed at the end.
        state: changes in place.

    Raises:
        Stopped: a signal came; everything up to the last step is saved.
        Diverged: loss or gradient was not finite, or no rollback helped against spikes; nothing
            after it was saved.
        UserError: the last checkpoint could not be written.
        Mismatch: transformers reads the export as another model.
    """
    with run.resources:
        _train(run, state)
        log(write_final(run, state))  # a signal stops this at once: everything is saved


def _train(run: Run, state: RunState) -> None:
    recipe, total, first = run.recipe, run.recipe.total_steps, state.step
    run.saver.last_saved_step = state.step  # of the process before this one
    with StopRequest() as stop, run.display:
        steps, saved_at = StepLog(run), time.monotonic()
        if state.step and is_evaluation_due(run, state):  # a signal had stopped it
            evaluate_run(run, state, stop)
            if state.evaluated_step == state.step:
                save_checkpoint(run, state)
        signum, _ = _ask(run, stop, saved_at)()
        while not is_finished(recipe, state) and not signum:
            steps.begin_step()
            answer = _ask(run, stop, saved_at)  # the ranks agree while the step is computed
            batch = run.batches(state.step + state.data_offset)
            factor = lr_factor(recipe.schedule, total, state.step + 1)
            loss, grad_norm = train_step(run.context, batch, state.step, factor)
            state.step += 1
            state.tokens += recipe.tokens_per_step
            signum, save_by_time = answer()

            log_due = state.step in (1, total) or state.step % recipe.log.every_steps == 0
            evaluation_due = is_evaluation_due(run, state)
            save_due = _is_multiple(state.step, recipe.checkpoint.every_steps)
            if log_due:
                steps.write(state, recipe.optimizer.lr * factor, loss, grad_norm)
            if (log_due or evaluation_due) and _rolls_back(run, state, steps.clock):
                continue
            if evaluation_due and evaluate_run(run, state, stop) and recipe.checkpoint.keep_best:
                save_due = True
            if evaluation_due or state.step == total:  # a signal ends an evaluation
                signum, save_by_time = _ask(run, stop, saved_at)()
            if save_due or save_by_time:
                if _rolls_back(run, state, steps.clock):
                    continue
                save_checkpoint(run, state)
                saved_at = time.monotonic()
            log_save(run, run.saver.poll())

        steps.clock.pause()
        finish_save(run, is_last=True)
        if state.step != run.saver.last_saved_step:
            _rolls_back(run, state, steps.clock)
            save_checkpoint(run, state, must_succeed=True)
    if signum:
        raise _stopped(run, state, signum)
    log(
        f"finished at step {state.step}: {state.tokens:,} tokens, {steps.clock.total:.1f} s of "
        f"training in this process; {run.directory}"
    )
    if state.step == first:
        log(f"to train it further: minigpt resume {run.directory} --set train.steps=N")


def is_finished(recipe: Recipe, state: RunState) -> bool:
    """Return whether all steps are done, or the validation loss no longer falls."""
    patience = recipe.eval.patience
    return state.step >= recipe.total_steps or (
        patience is not None and state.evaluations_since_best >= patience
    )


def _is_multiple(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _ask(run: Run, stop: StopRequest, saved_at: float) -> Callable[[], list[int]]:
    """Ask all ranks whether to stop or to save; the function that is returned waits for the answer.

    The answer is [the signal that came to any rank or 0, whether any rank's clock says to save].

    Args:
        saved_at: the time of the last save.
    """
    minutes = run.recipe.checkpoint.every_minutes

    def own_values() -> tuple[int, bool]:
        is_time = bool(minutes) and time.monotonic() - saved_at >= 60 * minutes
        return stop.signum or 0, is_time

    return run.world.start_all_reduce_max(own_values)


def _rolls_back(run: Run, state: RunState, clock: Clock) -> bool:
    """Wait for the device and handle bad steps; return whether the run rolled back.

    Raises:
        Diverged: nothing can be done about them.
    """
    report = read_guard(run.context.guard)
    clock.pause()  # after the device was waited for: queued work is training time
    if not report.bad:
        return False
    finish_save(run)  # its checkpoint may be the one to roll back to
    return handle_bad_steps(run, state, report)


def _stopped(run: Run, state: RunState, signum: int) -> Stopped:
    name = signal.Signals(signum).name
    if not state.step:
        return Stopped(
            f"stopped by {name} before the first step; run the same command again", signum
        )
    return Stopped(
        f"stopped by {name} at step {state.step} of {run.recipe.total_steps}, everything is saved; "
        f"go on with: minigpt resume {run.directory}",
        signum,
    )
