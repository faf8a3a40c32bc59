"""``minigpt eval``."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from minigpt_cli.commands.options import Adapters, Debug, Device, Json, ModelPath, Version, option
from minigpt_cli.core.console import print_json
from minigpt_cli.core.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from tokenizers import Tokenizer

    from minigpt_cli.data.loader import Gathered
    from minigpt_cli.huggingface.load import TrainedModel

EXAMPLE = "minigpt eval runs/tiny --text notes.txt"

DATA = "Data"
DEFAULT_LENGTH = 1024  # tokens per sequence if no recipe says how many

Data = Annotated[
    Path | None,
    option("--data", "DIR", "A token dataset; default: the one that MODEL was trained on.", DATA),
]
Split = Annotated[str, option("--split", "NAME", "The split of the dataset.", DATA)]
Text = Annotated[Path | None, option("--text", "FILE", "A text file, instead of a dataset.", DATA)]
BatchSize = Annotated[int, option("--batch-size", "N", "Sequences per batch.", DATA, min=1)]
Dtype = Literal["auto", "fp32", "bf16", "fp16"]
ComputeDtype = Annotated[
    Dtype,
    option("--dtype", None, "Number format of matrix products; auto: as in training.", "Model"),
]


def eval_command(
    model: ModelPath,
    adapter: Adapters = None,
    data: Data = None,
    split: Split = "val",
    text: Text = None,
    batch_size: BatchSize = 8,
    device: Device = None,
    dtype: ComputeDtype = "auto",
    as_json: Json = False,
    version: Version = False,
    debug: Debug = False,
) -> None:
    """Measure loss, perplexity and bits per byte.

    Every token of a dataset's split or of a text is predicted once.
    """
    if text is not None and data is not None:
        raise UserError("--data and --text can't be combined: give one of them")
    from minigpt_cli.commands.loading import each_adapter, load_and_report

    trained = load_and_report(model, adapter, device)
    batches, bytes_per_token = _open_batches(trained, model, data, split, text, batch_size)
    compute = _set_dtype(trained, dtype)
    results = []
    for each in each_adapter(trained):
        checkpoint = (each and each.checkpoint) or trained.base.directory
        result = _evaluate(trained, batches(), bytes_per_token, compute) | {
            "checkpoint": str(checkpoint)
        }
        if each is not None and len(trained.adapters) > 1:
            result |= {"adapter": each.name}
        results.append(result)
    if as_json:
        print_json(results[0] if len(results) == 1 else {"adapters": results})
        return
    for result in results:
        name = f"{result['adapter']}: " if len(results) > 1 else ""
        print(
            "{name}loss {loss:.4f}  perplexity {perplexity:.2f}  bits per byte "
            "{bits_per_byte:.4f}  over {tokens:,} tokens".format(name=name, **result)
        )


def _open_batches(
    trained: "TrainedModel",
    model: Path,
    data: Path | None,
    split: str,
    text: Path | None,
    batch_size: int,
) -> "tuple[Callable[[], Iterator[Gathered]], float]":
    """Return (a function that returns an iterator over all batches, bytes of text per token)."""
    from minigpt_cli.data.sequences import open_eval_sequences
    from minigpt_cli.data.tokenizer import tokenizer_fingerprint

    recipe = trained.recipe
    if recipe is None:
        length = min(DEFAULT_LENGTH, trained.model.config.max_position_embeddings)
    else:
        length = recipe.train.sequence_length
    if text is not None:
        return _text_batches(text, trained.tokenizer, length, batch_size)
    if data is None:
        if recipe is None:
            raise UserError(f"{model}: no run, so its data is not known; give --data or --text")
        data = Path(recipe.data_path)
    found = open_eval_sequences(data, split, length, tokenizer_fingerprint(trained.tokenizer))
    return partial(found.batches, batch_size), found.bytes_per_token


def _text_batches(
    file: Path, tokenizer: "Tokenizer", length: int, batch_size: int
) -> "tuple[Callable[[], Iterator[Gathered]], float]":
    import numpy as np

    from minigpt_cli.data.tokenizer import eos_id
    from minigpt_cli.evaluate.loss import stream_batches

    text = _read(file)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise UserError(f"--text {file}: the file is empty; give a file with text")
    # An end-of-text token comes first, as before every document in training: the first token of
    # the text is predicted too.
    stream = np.array([eos_id(tokenizer), *ids])
    batches = partial(stream_batches, lambda a, b: stream[a:b], len(stream), length, batch_size)
    return batches, len(text.encode()) / len(ids)


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--text {text}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--text {text}: is not UTF-8 text: {first_line(error)}") from None


def _set_dtype(trained: "TrainedModel", name: Dtype) -> "torch.dtype":
    """Return the dtype of matrix products; a dtype that the user named also sets the weights'."""
    from minigpt_cli.model.precision import compute_dtype, weights_dtype
    from minigpt_cli.recipe import PrecisionSettings

    device = next(trained.model.parameters()).device
    if name == "auto":
        recipe = trained.recipe
        return compute_dtype(PrecisionSettings() if recipe is None else recipe.precision, device)
    dtype = compute_dtype(PrecisionSettings(dtype=name), device)
    trained.model.to(weights_dtype(dtype))
    return dtype


def _evaluate(
    trained: "TrainedModel",
    batches: "Iterator[Gathered]",
    bytes_per_token: float,
    dtype: "torch.dtype",
) -> dict[str, Any]:
    from minigpt_cli.data.tokenizer import token_byte_lengths
    from minigpt_cli.evaluate.loss import evaluate

    result = evaluate(
        trained.model,
        batches,
        dtype=dtype,
        token_bytes=token_byte_lengths(trained.tokenizer),
        bytes_per_token=bytes_per_token,
    )
    assert result is not None
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
    }
