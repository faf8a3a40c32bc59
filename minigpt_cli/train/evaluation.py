"""Evaluations within a run: validation loss, the best step so far, completed prompts."""

import math
import re

from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.core.console import log
from minigpt_cli.core.errors import Diverged
from minigpt_cli.core.faq import faq
from minigpt_cli.evaluate.loss import evaluate, fixed_sequences, sequence_batches
from minigpt_cli.train.checkpointing import finish_save, last_good_checkpoint
from minigpt_cli.train.run import Run
from minigpt_cli.train.stop import StopRequest


def is_evaluation_due(run: Run, state: RunState) -> bool:
    """Return whether the step that ``state`` has done is to be evaluated, and wasn't yet."""
    every = run.recipe.eval.every_steps
    due = state.step == run.recipe.total_steps or (every is not None and state.step % every == 0)
    return due and run.validation is not None and state.evaluated_step != state.step


def evaluate_run(run: Run, state: RunState, stop: StopRequest) -> bool:
    """Evaluate on the fixed validation sequences, note the result in ``state``, and log it.

    Args:
        run: with a validation split.
        state: changes in place, unless the evaluation was stopped.
        stop: gives the evaluation up between two batches, if any rank's is set.

    Returns:
        Whether this is the lowest validation loss so far.

    Raises:
        Diverged: the loss is not finite.
    """
    assert run.validation is not None
    sequences, world = run.validation.sequences, run.world
    ids = fixed_sequences(sequences.num_sequences, run.recipe.eval.windows)
    result = evaluate(
        run.context.model,
        sequence_batches(sequences, ids, run.context.micro_batch_size, world.rank, world.size),
        dtype=run.context.dtype,
        token_bytes=run.validation.token_bytes,
        bytes_per_token=run.validation.bytes_per_token,
        stop=lambda: any(world.all_reduce_max(bool(stop))),
        world=world,
    )
    if result is None:
        return False
    if not math.isfinite(result.loss):
        finish_save(run)  # it may become the last good one
        raise Diverged(
            f"training diverged: validation loss {result.loss} at step {state.step}; nothing "
            f"after the last checkpoint is saved. {last_good_checkpoint(run)} Try a lower "
            f"optimizer.lr {faq('loss-is-nan')}"
        )
    state.evaluated_step, state.val_loss = state.step, result.loss
    is_best = state.best_val_loss is None or result.loss < state.best_val_loss
    if is_best:
        state.best_val_loss, state.best_step = result.loss, state.step
    state.evaluations_since_best = 0 if is_best else state.evaluations_since_best + 1
    if run.metrics is not None:
        values = {
            "step": state.step,
            "tokens": state.tokens,
            "val_loss": result.loss,
            "val_perplexity": result.perplexity,
            "val_bits_per_byte": result.bits_per_byte,
        }
        run.trackers.log(run.metrics.write(values))
        run.display.evaluated(values)
    log(
        f"step {state.step}  validation: loss {result.loss:.4f}  perplexity "
        f"{result.perplexity:.2f}  bits per byte {result.bits_per_byte:.4f}"
        + ("  (best)" if is_best else f"  (best: step {state.best_step})")
    )
    for prompt, completion in run.prompts.complete(run.context.model):
        run.display.sampled(prompt, completion)
        shown = re.sub(r"\n{3,}", "\n\n", f"{prompt}{completion}").rstrip("\n")
        for line in shown.split("\n"):  # a young model may print nothing but newlines
            log(f"  | {line}")
        if run.samples is not None:
            sample = {"step": state.step, "prompt": prompt, "completion": completion}
            run.trackers.log(run.samples.write(sample))
    return is_best
