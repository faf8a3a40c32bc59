"""The dataset that a run trains on: a stream of tokens, or examples packed into rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt_cli.core.console import log, warn
from minigpt_cli.core.errors import UserError
from minigpt_cli.data.dataset import open_dataset
from minigpt_cli.data.instruction_dataset import is_instructions, open_instructions
from minigpt_cli.data.loader import Sequences, TokenSequences
from minigpt_cli.data.packing import PackedSequences, pack
from minigpt_cli.recipe import Recipe


@dataclass(frozen=True)
class TrainingData:
    """Both splits in rows of the recipe's length."""

    train: Sequences
    val: Sequences | None  # None where there is no row of it
    bytes_per_token: float  # of the validation split's text, by its counted targets
    tokenizer_file: Path
    vocab_size: int
    chat_template: str | None
    fingerprints: dict[str, Any]  # of what must be the same when a run goes on


def verify_data(recipe: Recipe) -> bool:
    """Compare every byte of a recipe's data with what was written, which may take minutes.

    Raises:
        Damaged: it isn't that.
    """
    path = Path(recipe.data_path)
    return bool((open_instructions if is_instructions(path) else open_dataset)(path, verify=True))


def open_data(recipe: Recipe) -> TrainingData:
    """The data of a recipe, which has been made.

    Raises:
        UserError: it isn't there, or too little for one row.
        Damaged: it isn't what was written.
    """
    path, length = Path(recipe.data_path), recipe.train.sequence_length
    if is_instructions(path):
        return _instructions(path, length, recipe.train.seed)
    dataset = open_dataset(path)
    manifest = dataset.manifest
    train, val = (TokenSequences(dataset.splits[name], length) for name in ("train", "val"))
    if not train.num_sequences:
        raise UserError(
            f"{path}: the training split holds {train.split.tokens:,} tokens, too few for one "
            f"window of train.sequence_length {length} + 1: more text, or shorter sequences"
        )
    if not val.num_sequences:
        warn(f"{path}: no validation window of {length} tokens; nothing is evaluated")
    return TrainingData(
        train=train,
        val=val if val.num_sequences else None,
        bytes_per_token=manifest.splits["val"].bytes / max(1, val.split.tokens),
        tokenizer_file=dataset.tokenizer_file,
        vocab_size=manifest.vocab_size,
        chat_template=None,
        fingerprints={
            "tokenizer": manifest.tokenizer_fingerprint,
            "content": manifest.fingerprint,
        },
    )


def _instructions(path: Path, length: int, seed: int) -> TrainingData:
    dataset = open_instructions(path)
    manifest = dataset.manifest
    train, val = (pack(dataset.splits[name], length, seed) for name in ("train", "val"))
    if not train.num_sequences:
        raise UserError(
            f"{path}: none of {train.left_out:,} examples fits train.sequence_length {length}: "
            "longer sequences, or shorter examples"
        )
    for name, rows in (("train", train), ("val", val)):
        _tell(f"{path} {name}", rows)
    if not val.num_sequences:
        warn(f"{path}: no validation example of at most {length} tokens; nothing is evaluated")
    counts = manifest.splits["val"]
    return TrainingData(
        train=train,
        val=val if val.num_sequences else None,
        bytes_per_token=counts.trained_bytes / max(1, counts.trained_tokens),
        tokenizer_file=dataset.tokenizer_file,
        vocab_size=manifest.vocab_size,
        chat_template=manifest.chat_template,
        fingerprints={
            "tokenizer": manifest.tokenizer_fingerprint,
            "content": manifest.fingerprint,
        },
    )


def _tell(what: str, rows: PackedSequences) -> None:
    length = rows.sequence_length
    log(f"{what}: {rows.examples:,} examples in {rows.num_sequences:,} rows, {rows.fill:.0%} full")
    if rows.left_out:
        warn(
            f"{what}: {rows.left_out:,} of {rows.left_out + rows.examples:,} examples are longer "
            f"than train.sequence_length {length} and are left out"
        )
