"""The numbers of one run that a report, its page and ``--json`` name."""

from dataclasses import dataclass

import numpy as np

from minigpt_cli.report.curves import Column
from minigpt_cli.report.run_contents import RunContents

_LAST = 20  # logged steps; the mean of their losses is less noisy than the last one
_FEWEST = 20  # gradient norms after warmup that make a percentile


@dataclass(frozen=True)
class ClipAdvice:
    """What the gradient norms say about ``optimizer.clip_norm``.

    Attributes:
        clip_norm: the recipe's; None if the recipe can't be read.
        p90, p95: percentiles of the logged norms, before clipping.
        clipped: share of the logged steps whose norm is above ``clip_norm``; None without one.
        after_step: the percentiles and the share are of later steps: those after warmup, unless
            they are too few.
    """

    clip_norm: float | None
    p90: float
    p95: float
    clipped: float | None
    after_step: int

    @property
    def text(self) -> str:
        """A sentence for people."""
        since = f" after warmup (step {self.after_step:,})" if self.after_step else ""
        norms = f"90% of the logged gradient norms{since} are below {self.p90:.3g}, 95% below"
        advice = (
            f"a clip_norm from {self.p90:.2g} to {self.p95:.2g} clips only the 5% to 10% largest"
        )
        if self.clip_norm is None:
            return f"{norms} {self.p95:.3g}: {advice}."
        if self.clipped is None:
            return f"{norms} {self.p95:.3g}. Nothing is clipped (clip_norm = 0): {advice}."
        clipped = f"clip_norm = {self.clip_norm:g} clipped {self.clipped:.1%} of the logged steps"
        return f"{norms} {self.p95:.3g}. {clipped}: {advice}."


@dataclass(frozen=True)
class RunNumbers:
    """The numbers of a run. None: not recorded.

    Attributes:
        step, tokens, seconds: reached so far; seconds of training, without evaluation and saving.
        total_steps: of the recipe.
        loss: the mean of the last 20 logged ones.
        val_loss, val_perplexity, val_bits_per_byte: of the last evaluation.
        best_val_loss, best_step: the lowest, and its step.
        tokens_per_second, mfu: the median over logged steps.
        memory_bytes: the peak.
        time: when the last step was logged, in s since 1970.
        nonfinite: logged losses that were no number.
        parameters: of the weights in the last checkpoint; of an adapter, its own.
        clip: None without gradient norms.
    """

    step: int | None
    total_steps: int | None
    tokens: int | None
    seconds: float | None
    loss: float | None
    val_loss: float | None
    val_perplexity: float | None
    val_bits_per_byte: float | None
    best_val_loss: float | None
    best_step: int | None
    tokens_per_second: float | None
    mfu: float | None
    memory_bytes: int | None
    time: float | None
    nonfinite: int
    parameters: int | None
    clip: ClipAdvice | None


def numbers_of(run: RunContents) -> RunNumbers:
    """Compute the numbers of a run."""
    training, validation = run.metrics.training, run.metrics.validation
    step, tokens, memory = (_last(training[key]) for key in ("step", "tokens", "memory_bytes"))
    val_losses = validation["val_loss"]
    best = int(np.nanargmin(val_losses)) if _known(val_losses).size else None
    losses = _known(training["loss"][-_LAST:])
    return RunNumbers(
        step=None if step is None else int(step),
        total_steps=None if run.recipe is None else run.recipe.total_steps,
        tokens=None if tokens is None else int(tokens),
        seconds=_last(training["seconds"]),
        loss=float(losses.mean()) if losses.size else None,
        val_loss=_last(val_losses),
        val_perplexity=_last(validation["val_perplexity"]),
        val_bits_per_byte=_last(validation["val_bits_per_byte"]),
        best_val_loss=None if best is None else float(val_losses[best]),
        best_step=None if best is None else int(validation["step"][best]),
        tokens_per_second=_median(training["tokens_per_second"]),
        mfu=_median(training["mfu"]),
        memory_bytes=None if memory is None else int(np.nanmax(training["memory_bytes"])),
        time=_last(training["time"]),
        nonfinite=int(np.isnan(training["loss"]).sum()),
        parameters=_parameters(run),
        clip=_clip_advice(run),
    )


def _clip_advice(run: RunContents) -> ClipAdvice | None:
    training, recipe = run.metrics.training, run.recipe
    after = 0 if recipe is None else recipe.schedule.warmup_steps
    norms = _known(training["grad_norm"][training["step"] > after])
    if norms.size < _FEWEST:
        after, norms = 0, _known(training["grad_norm"])
    if not norms.size:
        return None
    clip_norm = None if recipe is None else recipe.optimizer.clip_norm
    p90, p95 = np.percentile(norms, [90, 95])
    clipped = float((norms > clip_norm).mean()) if clip_norm else None
    return ClipAdvice(clip_norm, float(p90), float(p95), clipped, after)


def _parameters(run: RunContents) -> int | None:
    for saved in reversed(run.checkpoints):
        if saved.manifest is not None:
            shapes = [
                entry["shape"]
                for name, entry in saved.manifest.tensors.items()
                if name.startswith("weights.")
            ]
            return sum(int(np.prod(shape, dtype=object)) for shape in shapes)
    return None


def _known(column: Column) -> Column:
    return column[np.isfinite(column)]


def _last(column: Column) -> float | None:
    known = _known(column)
    return float(known[-1]) if known.size else None


def _median(column: Column) -> float | None:
    known = _known(column)
    return float(np.median(known)) if known.size else None
