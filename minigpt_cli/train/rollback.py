"""Handle bad steps on the host: report them, end the run, or roll back to a checkpoint."""

import math
from pathlib import Path

from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.state import RunState, read_state
from minigpt_cli.core.console import warn
from minigpt_cli.core.errors import Diverged, UserError
from minigpt_cli.core.faq import faq
from minigpt_cli.core.run_dir import INCIDENTS
from minigpt_cli.train.checkpointing import last_good_checkpoint, restore_checkpoint
from minigpt_cli.train.guard_report import BadStep, GuardReport, clear_report, divergence
from minigpt_cli.train.incidents import report_bad_steps, write_incident
from minigpt_cli.train.run import Run

MAX_ROLLBACKS_IN_A_ROW = 3  # without an ordinary checkpoint in between


def handle_bad_steps(run: Run, state: RunState, report: GuardReport) -> bool:
    """Write an incident, and roll back if too many steps in a row were bad; every rank calls it.

    Args:
        run: its guard's report is cleared.
        state: changes in place if the run rolls back.
        report: with at least one bad step.

    Returns:
        Whether the run rolled back.

    Raises:
        Diverged: spikes aren't watched, or a rollback is impossible.
    """
    first = report.steps[0]
    finite = run.world.all_gather_json(math.isfinite(first.local_loss), bool)
    file = ""
    try:
        if run.world.rank == 0:
            ranks = [rank for rank, is_finite in enumerate(finite) if not is_finite]
            file = report_bad_steps(run, state, report, ranks or list(range(run.world.size)))
    except (OSError, UserError) as error:  # a full disk must not hide the bad steps themselves
        warn(f"the incident at step {first.step} could not be written: {error}")
    file = run.world.all_gather_json(file, str)[0]
    if run.context.guard.spikes is None:
        where = f" Its batch: {run.directory / file}." if file else ""
        raise divergence(report, last_good_checkpoint(run) + where)
    more = f", and {report.bad - 1} more up to step {_last_step(report)}" if report.bad > 1 else ""
    section = faq("loss-spikes" if first.is_finite else "loss-is-nan")
    warn(f"step {first.step}{more}: update skipped: {_reason(first)}; {file} {section}")
    if report.rollback_at:
        _roll_back(run, state, report.rollback_at)
        return True
    clear_report(run.context.guard)
    return False


def _roll_back(run: Run, state: RunState, step: int) -> None:
    """Go back to the last checkpoint, but not to its data.

    ``state`` becomes the checkpoint's, except for the place in the data: the next step trains on
    the batch that would have come after ``step``.

    Args:
        run: weights, optimizers, scaler and guard change in place.
        state: changes in place.
        step: the last bad step.

    Raises:
        Diverged: there is no checkpoint, or earlier rollbacks did not help.
    """
    context = run.context
    assert context.guard.spikes is not None
    in_a_row = f"{context.guard.spikes.rollback_after} spikes in a row up to step {step}"
    try:
        checkpoint, manifest, skipped_checkpoints = store.newest_valid(run.directory, run.world)
    except UserError as error:
        raise Diverged(
            f"training diverged: {in_a_row}, and there is no checkpoint to roll back to ({error}). "
            "Save earlier, with checkpoint.every_steps, or try a lower optimizer.lr "
            f"{faq('loss-spikes')}"
        ) from None
    if state.rollbacks >= MAX_ROLLBACKS_IN_A_ROW:
        raise Diverged(
            f"training diverged: {in_a_row}, after {state.rollbacks} rollbacks to "
            f"{checkpoint.name} that did not help. Try a lower optimizer.lr, or a larger "
            "guard.rollback_after to skip more steps before a rollback; the data of the spikes is "
            f"described in {run.directory / INCIDENTS} {faq('loss-spikes')}"
        )
    for problem in skipped_checkpoints:
        warn(problem)
    saved, old_offset = read_state(checkpoint), state.data_offset
    assert saved.step < step, (saved.step, step)
    if saved.guard:
        saved.guard["spikes_in_a_row"] = 0
    restore_checkpoint(context, checkpoint, manifest, saved)
    saved.data_offset = old_offset + step - saved.step
    saved.rollbacks, saved.rollback_step = state.rollbacks + 1, saved.step
    saved.dataset = state.dataset  # a resume with --allow-change may have changed it since
    vars(state).update(vars(saved))
    run.saver.last_saved_step = None  # the next save has another place in the data

    if run.world.rank == 0:
        _record_rollback(run, state, step, old_offset, checkpoint)
    warn(
        f"{in_a_row}: rolled back to {checkpoint.name}; the data of steps {state.step + 1} to "
        f"{step} is skipped; see {INCIDENTS}/ {faq('loss-spikes')}"
    )


def _record_rollback(
    run: Run, state: RunState, step: int, old_offset: int, checkpoint: Path
) -> None:
    """Cut the metrics back to one curve, and write an incident."""
    for later, path in store.list_steps(run.directory):
        if later > state.step:  # a damaged one
            store.set_aside(path)
    assert run.metrics is not None
    assert run.samples is not None
    evaluated = state.evaluated_step == state.step
    try:
        kept, completed = (
            file.cut_back(state.step, evaluated) for file in (run.metrics, run.samples)
        )
        run.trackers.go_back(state.step, evaluated)
        run.display.restart(state.step, kept, completed)
        write_incident(
            run,
            "rollback",
            step,
            old_offset,
            {
                "step": step,
                "to_step": state.step,
                "checkpoint": str(checkpoint.relative_to(run.directory)),
                "rollbacks_in_a_row": state.rollbacks,
                "data_passed_over": [state.step + old_offset, step + old_offset],  # [from, to)
                "data_offset": state.data_offset,
            },
        )
    except OSError as error:
        warn(f"the rollback could not be recorded: {error.strerror}")


def _last_step(report: GuardReport) -> str:
    last = report.steps[-1].step
    return str(last) if len(report.steps) == report.bad else f"{last} and beyond"


def _reason(bad: BadStep) -> str:
    if not bad.is_finite:
        return f"loss {bad.loss:.4g}, gradient norm {bad.grad_norm:.4g}"
    parts = []
    if bad.loss > bad.loss_limit:
        parts.append(f"loss {bad.loss:.4f} is above {bad.loss_limit:.4f}")
    if bad.grad_norm > bad.grad_norm_limit:
        parts.append(f"gradient norm {bad.grad_norm:.4f} is above {bad.grad_norm_limit:.4f}")
    return ", ".join(parts)
