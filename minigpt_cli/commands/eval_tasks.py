"""``minigpt eval --tasks``: tasks of lm-evaluation-harness."""

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minigpt_cli.core.console import console, log, print_json, print_result
from minigpt_cli.core.errors import UserError, first_line

if TYPE_CHECKING:
    from minigpt_cli.commands.options import Dtype
    from minigpt_cli.huggingface.load import TrainedModel


@dataclass(frozen=True)
class Request:
    """The options of ``eval`` that belong to tasks."""

    tasks: str
    tasks_dir: Path | None
    trust_tasks: bool
    limit: int | None
    num_fewshot: int | None
    chat: bool


def eval_tasks(
    request: Request,
    model: Path,
    adapters: list[Path] | None,
    device: str | None,
    dtype: "Dtype",
    batch_size: int,
    as_json: bool,
) -> None:
    """Run tasks on a model, with each of its adapters in turn, and print the results.

    Raises:
        UserError: lm-eval is missing; or see ``find_tasks`` and ``run_tasks``.
    """
    names = [name for name in map(str.strip, request.tasks.split(",")) if name]
    if not names:
        raise UserError(f"--tasks {request.tasks!r}: names no task; give NAME,NAME,...")
    os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars; read when tqdm is imported
    try:
        from minigpt_cli.evaluate.harness import run_tasks
        from minigpt_cli.evaluate.harness_tasks import find_tasks
    except ImportError as error:
        raise UserError(
            "--tasks needs lm-evaluation-harness 0.4.13 or newer: pip install 'lm-eval>=0.4.13' "
            f"({first_line(error)})"
        ) from None
    from minigpt_cli.commands.loading import each_adapter, load_and_report, set_dtype

    found = find_tasks(names, request.tasks_dir, request.trust_tasks)
    trained = load_and_report(model, adapters, device)
    name = "fp32" if dtype == "auto" else dtype
    compute = set_dtype(trained, name)
    log(f"tasks: {', '.join(found.names)}")
    results = []
    for adapter in each_adapter(trained):
        wrapped = _wrap(trained, batch_size, compute, request.chat)
        result = run_tasks(wrapped, found, limit=request.limit, num_fewshot=request.num_fewshot)
        result |= {
            "model": str(model),
            "checkpoint": str(trained.checkpoint_of(adapter)),
            "dtype": name,
            "limit": request.limit,
            "chat": request.chat,
        }
        if adapter is not None and len(trained.adapters) > 1:
            result |= {"adapter": adapter.name}
        results.append(result)
    if as_json:
        print_json(results[0] if len(results) == 1 else {"adapters": results})
        return
    for result in results:
        if len(results) > 1:
            print_result(f"{result['adapter']}:")
        _print_table(result)


def _wrap(trained: "TrainedModel", batch_size: int, dtype: Any, chat: bool) -> Any:
    from minigpt_cli.data.tokenizer import eos_id
    from minigpt_cli.evaluate.harness_model import HarnessModel
    from minigpt_cli.huggingface.base_model import start_token_id, stop_token_ids

    tokenizer = trained.tokenizer
    return HarnessModel(
        trained.model,
        tokenizer,
        start_id=start_token_id(trained.base, tokenizer),
        stop_ids=stop_token_ids(trained.base, tokenizer) | {eos_id(tokenizer)},
        batch_size=batch_size,
        dtype=dtype,
        track=_track,
        render_chat=_chat_renderer(trained) if chat else None,
    )


def _chat_renderer(trained: "TrainedModel") -> Callable[[list[dict[str, str]]], str]:
    from minigpt_cli.data.chat import render
    from minigpt_cli.huggingface.auxiliary_files import chat_template

    base = trained.base
    template, variables = chat_template(base.tokenizer, base.auxiliary_files)
    if template is None:
        raise UserError(f"{base.name}: has no chat template; leave out --chat")
    return partial(render, template, add_generation_prompt=True, variables=variables)


def _track(batches: Sequence[Any], what: str) -> Iterable[Any]:
    from rich.progress import track

    return track(
        batches,
        what,
        console=console(),
        transient=True,
        disable=not console().is_terminal,
    )


def _print_table(result: dict[str, Any]) -> None:
    """Print a row for each metric; in a pipe, as wide as it has to be."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    from minigpt_cli.core.console import discarded_if_closed

    table = Table(box=SIMPLE, pad_edge=False, show_edge=False)
    for heading in ("task", "metric"):
        table.add_column(heading, overflow="fold")
    for heading in ("value", "stderr", "better", "samples", "shots"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in ("tasks", "groups"):
        if kind == "groups" and result[kind]:
            table.add_section()
        for name, each in result[kind].items():
            for metric, found in each["metrics"].items():
                table.add_row(
                    name,
                    metric,
                    _shown(found["value"]),
                    _shown(found["stderr"]),
                    {True: "higher", False: "lower", None: ""}[found["higher_is_better"]],
                    f"{each['samples']:,}",
                    _shown(each["num_fewshot"]),
                )
    on_terminal = sys.stdout is not None and sys.stdout.isatty()
    output = Console(highlight=False, width=None if on_terminal else 10_000)
    with discarded_if_closed():
        output.print(table)


def _shown(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:,.4f}"
