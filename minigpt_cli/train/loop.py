"""fit(): the only training loop. One pass is one optimizer step."""

import math
import signal
import time
from typing import Any

import torch

from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.base import COMPANIONS
from minigpt_cli.checkpoint.saver import Saved
from minigpt_cli.checkpoint.state import STATE_FILE, RunState, state_bytes
from minigpt_cli.checkpoint.tensors import tensors_of
from minigpt_cli.distributed.parallel import local
from minigpt_cli.errors import Diverged, Stopped, UserError
from minigpt_cli.evaluate.loss import evaluate, fixed_windows, window_batches
from minigpt_cli.recipe import Recipe, dump
from minigpt_cli.report.console import TrainingDisplay, say
from minigpt_cli.train import guard, rollback
from minigpt_cli.train.finish import write_final
from minigpt_cli.train.run import Run
from minigpt_cli.train.schedule import lr_at
from minigpt_cli.train.step import train_step
from minigpt_cli.train.stop import StopRequest


class Clock:
    """Training time since the last logged step; what stands between ``pause`` and ``start`` is not
    counted: evaluating, saving, printing."""

    def __init__(self) -> None:
        self.seconds = 0.0  # since the last lap
        self.total = 0.0
        self._since: float | None = None

    def start(self) -> None:
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        if self._since is not None:
            elapsed = time.perf_counter() - self._since
            self.seconds, self.total, self._since = (
                self.seconds + elapsed,
                self.total + elapsed,
                None,
            )

    def lap(self) -> float:
        self.pause()
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def is_finished(recipe: Recipe, state: RunState) -> bool:
    """Whether all steps are made, or the validation loss has stopped falling."""
    patience = recipe.eval.patience
    return state.step >= recipe.total_steps or (
        patience is not None and state.evaluations_since_best >= patience
    )


def fit(run: Run, state: RunState) -> None:
    """Train from ``state`` to the end of the recipe, and export what was trained.

    Raises:
        Stopped: a signal came; everything up to a step's end is saved.
        Diverged: loss or gradient was not finite, or no rollback helped against spikes; nothing
            after it was saved.
        Mismatch: transformers reads the export as another model.
    """
    with run.resources:
        _train(run, state)
        say(write_final(run, state))  # here a signal stops at once: all is saved


def _train(run: Run, state: RunState) -> None:
    recipe, total = run.recipe, run.recipe.total_steps
    peak = recipe.optimizer.lr
    clock, lap_steps, saved_at, saved_step = Clock(), 0, time.monotonic(), state.step
    with StopRequest() as stop, TrainingDisplay(total, state.step) as display:
        if state.step and _evaluation_is_due(run, state):  # a stop had cut it short
            _evaluate(run, state, display, stop)
            if state.evaluated_step == state.step:
                saved_step = _save(run, state, display) or saved_step
        (signum,) = run.world.all_reduce_max(stop.signum or 0)  # whichever rank it came to
        while not is_finished(recipe, state) and not signum:
            clock.start()
            batch = run.batches(state.step + state.data_offset)
            lr = lr_at(recipe.schedule, peak, total, state.step + 1)
            loss, grad_norm = train_step(run.trainer, batch, state.step, lr / peak)
            state.step += 1
            state.tokens += recipe.tokens_per_step
            lap_steps += 1

            if state.step == 1 or state.step % recipe.log.every_steps == 0 or state.step == total:
                numbers = torch.stack([loss, grad_norm]).tolist()  # waits for the device
                _log(run, state, display, lr, numbers, clock.lap() / lap_steps)
                lap_steps = 0
                if _settle(run, state, display, clock):
                    continue  # from the checkpoint that it was rolled back to
            is_best = False
            if _evaluation_is_due(run, state):
                if _settle(run, state, display, clock):
                    continue
                is_best = _evaluate(run, state, display, stop)

            minutes = recipe.checkpoint.every_minutes
            timed = bool(minutes) and time.monotonic() - saved_at >= 60 * minutes
            signum, timed_out = run.world.all_reduce_max(stop.signum or 0, timed)
            every = recipe.checkpoint.every_steps
            best = is_best and recipe.checkpoint.keep_best
            if timed_out or best or (every is not None and state.step % every == 0):
                if _settle(run, state, display, clock):
                    continue
                saved_step = _save(run, state, display) or saved_step
                saved_at = time.monotonic()
            saved_step = _tell(run.saver.poll(), display) or saved_step

        clock.pause()
        saved_step = _tell(run.saver.wait(), display) or saved_step
        if saved_step != state.step:
            _settle(run, state, display, clock)
            _save(run, state, display, must_be_there=True)
        if signum:
            name = signal.Signals(signum).name
            raise Stopped(
                f"stopped by {name} at step {state.step} of {total}, everything is saved; go on "
                f"with: minigpt resume {run.directory}"
                if state.step
                else f"stopped by {name} before the first step; run the same command again",
                signum,
            )
        display.say(
            f"finished at step {state.step}: {state.tokens:,} tokens, {clock.total:.1f} s of "
            f"training in this process; {run.directory}"
        )


def _settle(run: Run, state: RunState, display: TrainingDisplay, clock: Clock) -> bool:
    """Wait for the device, then stop the clock: what was queued is training time.

    Returns True if the guard has seen spikes without an end and the run went back to a checkpoint.
    """
    seen = guard.look(run.trainer.guard)
    clock.pause()
    if not seen.bad:
        return False
    _tell(run.saver.wait(), display)  # it may be the one to go back to
    return rollback.handle(run, state, seen, last_good=_last_good(run), say=display.say)


def _log(
    run: Run,
    state: RunState,
    display: TrainingDisplay,
    lr: float,
    numbers: list[float],
    seconds_per_step: float,
) -> None:
    loss, grad_norm = numbers
    rate = run.recipe.tokens_per_step / seconds_per_step
    peak = run.peak_flops
    values = {
        "step": state.step,
        "tokens": state.tokens,
        "loss": loss,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_second": rate,
        "mfu": None if peak is None else rate * run.flops_per_token / peak,
    }
    if run.trainer.scaler.is_enabled():
        values["loss_scale"] = run.trainer.scaler.get_scale()
        values["skip_rate"] = skip_rate = guard.skip_rate(run.trainer.guard, state.step)
        if warning := guard.warn_about_skips(run.trainer.guard, skip_rate, state.step):
            display.say(f"warning: {warning}")
    _write_metrics(run, display, values)
    display.step(values, (run.recipe.total_steps - state.step) * seconds_per_step)
    if (state.step == 1 and run.recipe.base is None) and (
        warning := guard.warn_about_first_loss(loss, run.trainer.model.config.vocab_size)
    ):
        display.say(f"warning: {warning}")


def _evaluation_is_due(run: Run, state: RunState) -> bool:
    every = run.recipe.eval.every_steps
    due = state.step == run.recipe.total_steps or (every is not None and state.step % every == 0)
    return due and run.validation is not None and state.evaluated_step != state.step


def _evaluate(run: Run, state: RunState, display: TrainingDisplay, stop: StopRequest) -> bool:
    """Evaluate and complete the prompts; True if this is the lowest loss so far."""
    assert run.validation is not None
    recipe, v = run.recipe, run.validation
    ids = fixed_windows(v.rows.windows, recipe.eval.windows)
    result = evaluate(
        run.trainer.model,
        window_batches(v.rows, ids, run.trainer.micro_batch_size, run.world.rank, run.world.size),
        dtype=run.trainer.dtype,
        token_bytes=v.token_bytes,
        bytes_per_token=v.bytes_per_token,
        stop=lambda: any(run.world.all_reduce_max(bool(stop))),
        world=run.world,
    )
    if result is None:
        return False
    if not math.isfinite(result.loss):
        _tell(run.saver.wait(), display)  # it may be the last good one
        raise Diverged(
            f"training diverged: validation loss {result.loss} at step {state.step}; nothing "
            f"after the last checkpoint is saved. {_last_good(run)} Try a lower optimizer.lr"
        )
    state.evaluated_step, state.val_loss = state.step, result.loss
    is_best = state.best_val_loss is None or result.loss < state.best_val_loss
    if is_best:
        state.best_val_loss, state.best_step = result.loss, state.step
    state.evaluations_since_best = 0 if is_best else state.evaluations_since_best + 1
    values = {
        "step": state.step,
        "tokens": state.tokens,
        "val_loss": result.loss,
        "val_perplexity": result.perplexity,
        "val_bits_per_byte": result.bits_per_byte,
    }
    _write_metrics(run, display, values)
    display.say(
        f"step {state.step}  validation: loss {result.loss:.4f}  perplexity "
        f"{result.perplexity:.2f}  bits per byte {result.bits_per_byte:.4f}"
        + ("  (best)" if is_best else f"  (best: step {state.best_step})")
    )
    for prompt, completion in run.prompts.complete(run.trainer.model):
        display.say(f"  | {prompt}{completion}".replace("\n", "\n  | "))
    return is_best


def _write_metrics(run: Run, display: TrainingDisplay, values: dict[str, Any]) -> None:
    try:
        if run.metrics is not None:
            run.metrics.write(values)
    except OSError as error:  # a full disk; the run itself can go on
        display.say(f"warning: metrics.jsonl could not be written: {error.strerror}")


def _flush_metrics(run: Run, display: TrainingDisplay) -> None:
    try:
        if run.metrics is not None:
            run.metrics.flush()
    except OSError as error:
        display.say(f"warning: metrics.jsonl could not be written: {error.strerror}")


def _save(
    run: Run, state: RunState, display: TrainingDisplay, must_be_there: bool = False
) -> int | None:
    """Begin to save a checkpoint; training can go on when this returns.

    Returns its step if it is there already: where saves are not asynchronous, and where it
    ``must_be_there``.

    Raises:
        UserError: it ``must_be_there`` and could not be written.
    """
    trainer = run.trainer
    _tell(run.saver.poll(), display)
    began = time.monotonic()
    _tell(run.saver.wait(), display)  # also where it isn't busy: on another rank it may be
    if (waited := time.monotonic() - began) >= 0.1:
        display.say(f"waited {waited:.1f} s for the save before this one")
    guard.check(trainer.guard, _last_good(run))
    tensors = tensors_of(trainer.model, trainer.optimizers)
    if any(run.world.all_reduce_max(not guard.are_finite(local(list(tensors.values()))))):
        raise Diverged(
            f"training diverged: weights or optimizer state are not finite at step {state.step}; "
            f"this step is not saved. {_last_good(run)} Try a lower optimizer.lr, or "
            "optimizer.clip_norm=1"
        )
    state.skipped = int(trainer.guard.skipped.item())
    state.guard = guard.saved(trainer.guard, state.step)
    if state.step > state.rollback_step and not state.guard.get("spikes_in_a_row"):
        state.rollbacks = 0  # the last one helped
    state.scaler = trainer.scaler.state_dict()
    _flush_metrics(run, display)
    run.saver.start(
        state.step,
        tensors,
        {
            STATE_FILE: state_bytes(state),
            "recipe.toml": dump(run.recipe).encode(),
            "tokenizer.json": run.tokenizer_json,
            **({COMPANIONS: run.companions.dump()} if run.companions else {}),
        },
        state.val_loss if state.evaluated_step == state.step else None,
    )
    if run.recipe.checkpoint.asynchronous and not must_be_there:
        return None
    return _tell(run.saver.wait(), display, must_be_there)


def _tell(saved: Saved | None, display: TrainingDisplay, must_be_there: bool = False) -> int | None:
    """Say what became of a save; returns its step if it is there.

    Raises:
        UserError: it ``must_be_there`` and is not.
    """
    if saved is None:
        return None
    if saved.problem is None:
        display.say(f"saved {saved.path}")
        return saved.step
    problem = f"{saved.path}: the checkpoint could not be written: {saved.problem}"
    if must_be_there:
        raise UserError(
            f"{problem}; older checkpoints are untouched: make room or mend the path, then minigpt "
            "resume"
        )
    display.say(f"warning: {problem}; training goes on and saves again at the next interval")
    return None


def _last_good(run: Run) -> str:
    steps = store.list_steps(run.directory)
    return (
        f"The last good checkpoint is {steps[-1][1]}." if steps else "No checkpoint was saved yet."
    )
