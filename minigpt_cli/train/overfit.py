"""``--overfit-one-batch``: a model that can't learn one batch by heart can't learn anything.

It takes seconds, and tells mistakes in model, data and learning rate from too little training.
"""

import math
import time
from dataclasses import dataclass, replace

from minigpt_cli.core.console import log
from minigpt_cli.core.errors import Diverged
from minigpt_cli.core.faq import faq
from minigpt_cli.recipe import GuardSettings, Recipe
from minigpt_cli.train.guard_report import read_guard
from minigpt_cli.train.step import train_step
from minigpt_cli.train.trial import first_batch, open_trial

GOAL = 0.1  # nats per token
MOST_STEPS = 500
_WARMUP_STEPS = 10  # at most
_LOG_EVERY = 25


@dataclass(frozen=True)
class Overfit:
    """How far a batch was learned.

    Attributes:
        steps: updates made.
        loss: before the last of them, nats per token.
        sequences: in the batch, over all ranks.
        seconds: of training.
    """

    steps: int
    loss: float
    sequences: int
    seconds: float

    @property
    def is_learned(self) -> bool:
        """Return whether the loss fell below the goal."""
        return self.loss < GOAL


def overfit_one_batch(recipe: Recipe) -> Overfit:
    """Train on the first micro-batch of each rank, until its loss is below 0.1 or 500 steps.

    Model, optimizer and peak learning rate are the recipe's. There is no dropout, no decay of the
    rate, and a warm-up of at most 10 steps. Every rank calls it. Nothing is left behind but the
    dataset, if it had to be prepared.

    Raises:
        UserError: the recipe can't be followed.
        Diverged: loss or gradient is not finite.
    """
    with open_trial(_without_dropout(recipe), None) as trial:
        context, world = trial.context, trial.world
        batch = first_batch(trial, context.micro_batch_size)
        sequences = world.size * context.micro_batch_size
        log(
            f"overfitting one batch of {sequences} x {recipe.train.sequence_length} tokens, at the "
            f"peak learning rate and without dropout, until its loss is below {GOAL}"
        )
        warmup = max(1, min(recipe.schedule.warmup_steps, _WARMUP_STEPS))
        began, loss, step = time.monotonic(), math.inf, 0
        while loss >= GOAL and step < MOST_STEPS:
            factor = min(1.0, (step + 1) / warmup)
            loss = float(train_step(context, batch, step, factor)[0])  # the same on every rank
            step += 1
            if step == 1 or step % _LOG_EVERY == 0 or loss < GOAL:
                log(f"step {step}/{MOST_STEPS}  loss {loss:.4f}")
            if not math.isfinite(loss) or (
                step % _LOG_EVERY == 0 and read_guard(context.guard).bad
            ):
                raise Diverged(
                    "one batch makes training diverge: loss or gradient is not finite at step "
                    f"{step}. Try a lower optimizer.lr, or precision.dtype=fp32 "
                    f"{faq('loss-is-nan')}"
                )
        return Overfit(step, loss, sequences, time.monotonic() - began)


def describe_overfit(result: Overfit) -> str:
    """Return what the result means, in a line; also what to do about a batch not learned."""
    if result.is_learned:
        return (
            f"one batch was learned: loss {result.loss:.4f} after {result.steps} steps, "
            f"{result.seconds:.1f} s. Model, optimizer and data can learn; no run was kept"
        )
    return (
        f"one batch was not learned: its loss is {result.loss:.4f} after {result.steps} steps, and "
        f"should be below {GOAL}. Try another optimizer.lr (ten times higher and lower), a smaller "
        "train.micro_batch_size (fewer sequences to learn), or a larger model; --dry-run shows the "
        f"text that is trained on {faq('loss-is-stuck')}"
    )


def _without_dropout(recipe: Recipe) -> Recipe:
    lora = None if recipe.lora is None else replace(recipe.lora, dropout=0.0)
    model = replace(recipe.model, dropout=0.0)
    return replace(recipe, model=model, lora=lora, guard=GuardSettings())
