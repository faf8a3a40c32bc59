"""What the host does about bad steps: report them, end the run, or go back to a checkpoint."""

import math
from collections.abc import Callable
from pathlib import Path

from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.state import RunState, read_state
from minigpt_cli.checkpoint.tensors import load_tensors
from minigpt_cli.errors import Diverged, UserError
from minigpt_cli.train import guard, incidents
from minigpt_cli.train.guard import BadStep, Seen
from minigpt_cli.train.run import Run

MOST_IN_A_ROW = 3  # rollbacks without an ordinary checkpoint in between


def handle(
    run: Run,
    state: RunState,
    seen: Seen,
    *,
    last_good: str,
    say: Callable[[str], None],
) -> bool:
    """Report the bad steps that were seen, on every rank; True if the run went back to a
    checkpoint.

    Args:
        last_good: where to go on from, for a message.

    Raises:
        Diverged: nothing can be done about them.
    """
    finite = run.world.all_gather_json(math.isfinite(seen.steps[0].local_loss))
    file = ""
    try:
        if run.world.rank == 0:
            ranks = [rank for rank, is_finite in enumerate(finite) if not is_finite]
            file = incidents.report(run, state, seen, ranks or list(range(run.world.size)))
    except (OSError, UserError) as error:  # a full disk must not hide what is being reported
        say(f"warning: the incident at step {seen.steps[0].step} could not be written: {error}")
    file = run.world.all_gather_json(file)[0]
    if run.trainer.guard.spikes is None:
        where = f" Its batch: {run.directory / file}." if file else ""
        raise guard.diverged(seen, last_good + where)
    first = seen.steps[0]
    more = f", and {seen.bad - 1} more up to step {_last(seen)}" if seen.bad > 1 else ""
    say(f"warning: step {first.step}{more}: update skipped: {_reason(first)}; {file}")
    if seen.rollback_at:
        roll_back(run, state, seen.rollback_at, say)
        return True
    guard.forget(run.trainer.guard)
    return False


def roll_back(run: Run, state: RunState, step: int, say: Callable[[str], None]) -> None:
    """Put the run back to its last checkpoint, and past the data that was met up to ``step``.

    ``state`` becomes what it was there, but for the place in the data: the next step trains on what
    would have come after ``step``.

    Raises:
        Diverged: there is no checkpoint, or going back to it has not helped before.
    """
    trainer, directory = run.trainer, run.directory
    assert trainer.guard.spikes is not None
    in_a_row = f"{trainer.guard.spikes.rollback_after} spikes in a row up to step {step}"
    try:
        checkpoint, manifest, passed_over = store.newest_valid(directory, run.world)
    except UserError as error:
        raise Diverged(
            f"training diverged: {in_a_row}, and there is no checkpoint to roll back to ({error}). "
            "Save earlier, with checkpoint.every_steps, or try a lower optimizer.lr"
        ) from None
    if state.rollbacks >= MOST_IN_A_ROW:
        raise Diverged(
            f"training diverged: {in_a_row}, after {state.rollbacks} rollbacks to "
            f"{checkpoint.name} that did not help. Try a lower optimizer.lr, a larger "
            "guard.rollback_after, to skip more steps before a rollback, or look at the data in "
            f"{directory / 'incidents'}"
        )
    for problem in passed_over:
        say(f"warning: {problem}")
    saved = read_state(checkpoint)
    assert saved.step < step, (saved.step, step)
    load_tensors(checkpoint, manifest.tensors, trainer.model, trainer.optimizers, run.world.control)
    if saved.scaler:
        trainer.scaler.load_state_dict(saved.scaler)
    guard.restore(trainer.guard, saved.guard | {"spikes_in_a_row": 0}, saved.step, saved.skipped)
    old_offset = state.data_offset
    saved.data_offset = old_offset + step - saved.step
    saved.rollbacks, saved.rollback_step = state.rollbacks + 1, saved.step
    saved.dataset = state.dataset  # a resume may have changed it since
    for name, value in vars(saved).items():
        setattr(state, name, value)

    if run.world.rank == 0:
        _record(run, state, step, old_offset, checkpoint, say)
    say(
        f"warning: {in_a_row}: rolled back to {checkpoint.name}, and on past the data of steps "
        f"{state.step + 1} to {step}; see incidents/"
    )


def _record(
    run: Run,
    state: RunState,
    step: int,
    old_offset: int,
    checkpoint: Path,
    say: Callable[[str], None],
) -> None:
    """Make the run directory hold one curve again, and tell what happened."""
    for later, path in store.list_steps(run.directory):
        if later > state.step:  # those that are damaged
            store.set_aside(path)
    assert run.metrics is not None
    try:
        run.metrics.cut_back(state.step, evaluated=state.evaluated_step == state.step)
        incidents.write(
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
        say(f"warning: the rollback could not be recorded: {error.strerror}")


def _last(seen: Seen) -> str:
    known = seen.steps[-1].step
    return str(known) if len(seen.steps) == seen.bad else f"{known} and beyond"


def _reason(bad: BadStep) -> str:
    if not bad.is_finite:
        return f"loss {bad.loss:.4g}, gradient norm {bad.grad_norm:.4g}"
    parts = []
    if bad.loss > bad.loss_limit:
        parts.append(f"loss {bad.loss:.4f} is above {bad.loss_limit:.4f}")
    if bad.grad_norm > bad.grad_norm_limit:
        parts.append(f"gradient norm {bad.grad_norm:.4f} is above {bad.grad_norm_limit:.4f}")
    return ", ".join(parts)
