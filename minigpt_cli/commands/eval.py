"""``minigpt eval``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from minigpt_cli.commands.options import (
    Adapters,
    Debug,
    Device,
    Dtype,
    Json,
    ModelPath,
    Version,
    option,
)
from minigpt_cli.core.console import console, log, print_json, print_result
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.signals import nothing_is_saved

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from minigpt_cli.data.sequences import EvalData
    from minigpt_cli.huggingface.load import TrainedModel

EXAMPLE = "minigpt eval runs/tiny --text notes.txt"

DATA, TASKS = "Data", "Tasks of lm-evaluation-harness"
DEFAULT_LENGTH = 1024  # tokens per sequence if no recipe says how many

Data = Annotated[
    Path | None,
    option("--data", "DIR", "A token dataset; default: MODEL's, or the first adapter's.", DATA),
]
Split = Annotated[str, option("--split", "NAME", "The split of the dataset.", DATA)]
Text = Annotated[
    Path | None,
    option("--text", "FILE", "A text file, instead of a dataset; may be .gz, .xz or .zst.", DATA),
]
BatchSize = Annotated[int, option("--batch-size", "N", "Sequences per batch.", DATA, min=1)]
ComputeDtype = Annotated[
    Dtype,
    option(
        "--dtype",
        None,
        "Number format of matrix products; auto: as in training; with --tasks fp32.",
        "Model",
    ),
]
Tasks = Annotated[
    str | None,
    option("--tasks", "NAME,...", "Run these tasks or groups instead of measuring loss.", TASKS),
]
TasksDir = Annotated[
    Path | None,
    option("--tasks-dir", "DIR", "A directory with tasks of your own, in YAML.", TASKS),
]
TrustTasks = Annotated[
    bool, option("--trust-tasks", "", "Let tasks of --tasks-dir run Python code.", TASKS)
]
Limit = Annotated[
    int | None,
    option("--limit", "N", "Use the first N samples of each task; default: all.", TASKS, min=1),
]
NumFewshot = Annotated[
    int | None,
    option(
        "--num-fewshot", "N", "Examples in each prompt; default: as each task says.", TASKS, min=0
    ),
]
Chat = Annotated[bool, option("--chat", "", "Ask in the form of the model's chat template.", TASKS)]


def eval_command(
    model: ModelPath,
    adapter: Adapters = None,
    data: Data = None,
    split: Split = "val",
    text: Text = None,
    tasks: Tasks = None,
    tasks_dir: TasksDir = None,
    trust_tasks: TrustTasks = False,
    limit: Limit = None,
    num_fewshot: NumFewshot = None,
    chat: Chat = False,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: ComputeDtype = "auto",
    as_json: Json = False,
    version: Version = False,
    debug: Debug = False,
) -> None:
    """Measure loss, perplexity and bits per byte; or run tasks.

    Every token of a dataset's split or of a text is predicted once; in instructions, only those of
    the answers.
    """
    nothing_is_saved()
    if text is not None and data is not None:
        raise UserError("--data and --text can't be combined: give one of them")
    if tasks is not None:
        if text is not None or data is not None:
            raise UserError("--tasks can't be combined with --data or --text: tasks have their own")
        from minigpt_cli.commands.eval_tasks import Request, eval_tasks

        request = Request(tasks, tasks_dir, trust_tasks, limit, num_fewshot, chat)
        eval_tasks(request, model, adapter, device, dtype, batch_size, as_json)
        return
    if tasks_dir or trust_tasks or limit is not None or num_fewshot is not None or chat:
        raise UserError("--tasks-dir, --limit, --num-fewshot and --chat need --tasks NAME,...")
    from minigpt_cli.commands.loading import each_adapter, load_and_report, set_dtype

    trained = load_and_report(model, adapter, device)
    found = _open_data(trained, model, data, split, text)
    compute = set_dtype(trained, dtype)
    results = []
    for each in each_adapter(trained):
        result = _evaluate(trained, found, batch_size, compute)
        result["checkpoint"] = str(trained.checkpoint_of(each))
        if each is not None and len(trained.adapters) > 1:
            result |= {"adapter": each.name}
        results.append(result)
    if as_json:
        print_json(results[0] if len(results) == 1 else {"adapters": results})
        return
    for result in results:
        name = f"{result['adapter']}: " if len(results) > 1 else ""
        print_result(
            "{name}loss {loss:.4f}  perplexity {perplexity:.2f}  bits per byte "
            "{bits_per_byte:.4f}  over {tokens:,} tokens".format(name=name, **result)
        )


def _open_data(
    trained: "TrainedModel", model: Path, data: Path | None, split: str, text: Path | None
) -> "EvalData":
    from minigpt_cli.data.sequences import open_eval_sequences
    from minigpt_cli.data.tokenizer import tokenizer_fingerprint

    recipe = trained.recipe
    if recipe is None:
        length = min(DEFAULT_LENGTH, trained.model.config.max_position_embeddings)
    else:
        length = recipe.train.sequence_length
    if text is not None:
        return _open_text(text, trained.tokenizer, length)
    if data is None:
        if recipe is None:
            raise UserError(f"{model}: no run, so its data is not known; give --data or --text")
        data = Path(recipe.data_path)
        log(f"dataset: {data}")
    return open_eval_sequences(data, split, length, tokenizer_fingerprint(trained.tokenizer))


def _open_text(file: Path, tokenizer: "Tokenizer", length: int) -> "EvalData":
    import numpy as np

    from minigpt_cli.data.dataset import split_in_memory
    from minigpt_cli.data.loader import TokenSequences
    from minigpt_cli.data.sequences import EvalData
    from minigpt_cli.data.tokenizer import eos_id, vocabulary_size

    text, eos = _read(file), eos_id(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise UserError(f"--text {file}: the file is empty; give a file with text")
    # An end-of-text token comes first, as before every document in training: the first token of
    # the text is predicted too.
    stream = np.array([eos, *ids])
    split = split_in_memory(stream, vocab_size=vocabulary_size(tokenizer), eos_id=eos)
    return EvalData(TokenSequences(split, length), len(text.encode()) / len(ids))


def _read(text: Path) -> str:
    from minigpt_cli.prepare.open_file import read_whole

    if str(text) == "-":
        raise UserError("--text -: standard input can't be read; write the text to a file first")
    try:
        return read_whole(text)
    except UserError as error:
        raise UserError(f"--text {error}") from None


def _evaluate(
    trained: "TrainedModel", data: "EvalData", batch_size: int, dtype: "torch.dtype"
) -> dict[str, Any]:
    from rich.progress import track

    from minigpt_cli.data.tokenizer import token_byte_lengths
    from minigpt_cli.evaluate.loss import evaluate

    result = evaluate(
        trained.model,
        track(
            data.batches(batch_size),
            "evaluating",
            total=-(-data.sequences.num_sequences // batch_size),
            console=console(),
            transient=True,
            disable=not console().is_terminal,
        ),
        dtype=dtype,
        token_bytes=token_byte_lengths(trained.tokenizer),
        bytes_per_token=data.bytes_per_token,
    )
    assert result is not None
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
    }
