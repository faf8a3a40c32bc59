"""Log a step: a line of metrics.jsonl, a line on the console, warnings."""

import time

import torch
from torch import Tensor

from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.core.console import warn
from minigpt_cli.distributed.device import peak_memory
from minigpt_cli.train.guard_report import overflow_rate, overflow_warning
from minigpt_cli.train.run import Run


class Clock:
    """A stopwatch for training time. Time between ``pause`` and ``start`` isn't counted.

    Attributes:
        total: seconds counted until the last ``pause``.
    """

    def __init__(self) -> None:
        """Create a clock that stands still."""
        self.total = 0.0
        self._lap = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Count from now on; nothing happens if the clock runs already."""
        if self._since is None:
            self._since = time.perf_counter()

    def pause(self) -> None:
        """Stop counting."""
        if self._since is not None:
            elapsed = time.perf_counter() - self._since
            self._lap, self.total, self._since = self._lap + elapsed, self.total + elapsed, None

    def lap(self) -> float:
        """Pause; return the seconds counted since the last lap."""
        self.pause()
        seconds, self._lap = self._lap, 0.0
        return seconds


class StepLog:
    """Times the steps, and writes the metrics of those that are logged.

    Attributes:
        clock: counts the time of steps: not of evaluating, saving and printing.
    """

    def __init__(self, run: Run):
        """Write to the run's metrics.jsonl and to its display."""
        self.clock = Clock()
        self._run = run
        self._steps = 0  # since the last one that was logged
        self._has_warned = False  # of fp16's overflows, and their rate is still high

    def begin_step(self) -> None:
        """Start the clock for the next step."""
        self.clock.start()
        self._steps += 1

    def write(self, state: RunState, lr: float, loss: Tensor, grad_norm: Tensor) -> None:
        """Log the step that ``state`` has just done. Waits for the device.

        Args:
            state: after the step.
            lr: the learning rate of its update.
            loss: of ``train_step``.
            grad_norm: of ``train_step``.
        """
        run, context = self._run, self._run.context
        numbers = torch.stack([loss, grad_norm]).tolist()  # waits for the device
        seconds_per_step = self.clock.lap() / self._steps
        self._steps = 0
        rate, peak = run.recipe.tokens_per_step / seconds_per_step, run.peak_flops
        values = {
            "step": state.step,
            "tokens": state.tokens,
            "loss": numbers[0],
            "lr": lr,
            "grad_norm": numbers[1],
            "tokens_per_second": rate,
            "mfu": None if peak is None else rate * run.flops_per_token / peak,
            "seconds": round(run.seconds_before + self.clock.total, 3),
            "memory_bytes": peak_memory(run.world.device),
        }
        if context.scaler.is_enabled():
            skip_rate = overflow_rate(context.guard, state.step)
            values |= {"loss_scale": context.scaler.get_scale(), "skip_rate": skip_rate}
            warning = overflow_warning(skip_rate, state.step)
            if warning and not self._has_warned:
                warn(warning)
            self._has_warned = warning is not None
        if run.metrics is not None:
            run.trackers.log(run.metrics.write(values))
        run.display.step(values, (run.recipe.total_steps - state.step) * seconds_per_step)
