"""Run tasks of lm-evaluation-harness. Needs the package lm-eval."""

import logging
import math
import os
import random
import sys
from contextlib import ExitStack, redirect_stdout
from importlib.metadata import version
from typing import Any

import datasets
import numpy as np
import torch
from lm_eval import evaluator
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

from minigpt_cli.core.console import printable, warn
from minigpt_cli.core.errors import UserError
from minigpt_cli.evaluate.harness_model import HarnessModel
from minigpt_cli.evaluate.harness_tasks import FoundTasks, harness_errors, loaded_tasks

_BOOTSTRAPS = 1000  # resamples for the standard error of metrics that are no mean


def run_tasks(
    model: HarnessModel,
    found: FoundTasks,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """Evaluate a model on tasks.

    Args:
        model: With ``render_chat`` its chat template is used.
        found: The tasks.
        limit: The most samples of each task.
        num_fewshot: Examples before each question; None: as each task says. A task
            that says 0 keeps 0.

    Returns:
        {"tasks": {name: result}, "groups": {name: result}, "harness": its version}. A result has
        "metrics" (name -> "value", "stderr" or None, "higher_is_better"), "samples",
        "num_fewshot" and "version". A metric's name has its filter after a comma, if it has one.

    Raises:
        UserError: A task can't be loaded or evaluated.
        Diverged: The model's logits are not finite.
    """
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)  # noqa: NPY002  # tasks draw from it
    torch.manual_seed(DEFAULT_OTHER_SEED)
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))  # standard output is for the result
        _silence(stack)
        loaded = stack.enter_context(loaded_tasks(found))
        if not loaded["tasks"]:
            raise UserError(f"--tasks {','.join(found.names)}: holds no task")
        for task in loaded["tasks"].values():
            _set_fewshot(task, num_fewshot)
        with harness_errors("lm-evaluation-harness"):
            results = evaluator.evaluate(
                lm=model,
                task_dict=loaded,
                limit=limit,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=False,
                apply_chat_template=model.render_chat is not None,
                fewshot_as_multiturn=model.render_chat is not None,
            )
        tasks = sorted(loaded["tasks"])
    return {
        "tasks": {name: _result(name, results) for name in tasks},
        "groups": {name: _result(name, results) for name in results.get("groups", {})},
        "harness": version("lm-eval"),
    }


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Set the number of examples as ``lm_eval.simple_evaluate`` does."""
    given = task.get_config("num_fewshot")
    if given is None or (num_fewshot is not None and given != 0):
        task.set_config(key="num_fewshot", value=num_fewshot or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _result(name: str, results: Any) -> dict[str, Any]:
    """Return the result of a task or a group, without the harness's own keys."""
    found = results["results"][name]
    better = results["higher_is_better"].get(name, {})
    metrics = {}
    for key, value in found.items():
        metric, _, filtered = key.partition(",")
        if not filtered or metric.endswith("_stderr") or isinstance(value, str):
            continue
        shown = metric if filtered == "none" else key
        metrics[shown] = {
            "value": _number(value),
            "stderr": _number(found.get(f"{metric}_stderr,{filtered}")),
            "higher_is_better": better.get(metric),
        }
    return {
        "metrics": metrics,
        "samples": found.get("sample_len"),
        "num_fewshot": results["n-shot"].get(name),
        "version": _number(results["versions"].get(name)),  # "Yaml" if the task has none
    }


def _number(value: Any) -> float | None:
    """Return a number that JSON can hold; None for "N/A", NaN and infinity."""
    if isinstance(value, str) or value is None or not math.isfinite(value):
        return None
    return float(value)


class _Errors(logging.Handler):
    """Prints the harness's errors as our warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        warn(printable(f"lm-evaluation-harness: {record.getMessage()}"))


def _silence(stack: ExitStack) -> None:
    """Switch off the harness's bars, its processes and all of its log but errors."""
    logger, handler = logging.getLogger("lm_eval"), _Errors(logging.ERROR)
    logger.addHandler(handler)
    stack.callback(logger.removeHandler, handler)
    propagates, logger.propagate = logger.propagate, False
    stack.callback(setattr, logger, "propagate", propagates)
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # its processes would outlive a signal
    if before is None:
        stack.callback(os.environ.pop, "DISABLE_MULTIPROC")
    if datasets.is_progress_bar_enabled():
        datasets.disable_progress_bars()
        stack.callback(datasets.enable_progress_bars)
