"""What ``evaluate`` reads: all of a text, or all of a dataset's split."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from minigpt_cli.core.console import warn
from minigpt_cli.core.errors import UserError
from minigpt_cli.data.dataset import open_dataset, require_same_tokenizer
from minigpt_cli.data.dataset_manifest import SPLITS
from minigpt_cli.data.instruction_dataset import is_instructions, open_instructions
from minigpt_cli.data.loader import Gathered
from minigpt_cli.data.packing import pack
from minigpt_cli.data.tokenizer import eos_id, token_byte_lengths, tokenizer_fingerprint
from minigpt_cli.evaluate.loss import sequence_batches, stream_batches

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class EvalData:
    """Batches for ``evaluate``, and how many bytes of text their tokens stand for.

    Attributes:
        batches: returns a new iterator over all batches.
        token_bytes: int32 (V,), UTF-8 bytes of each token; None if the tokenizer has no such table.
        bytes_per_token: the average, for tokenizers without that table.
    """

    batches: Callable[[], Iterator[Gathered]]
    token_bytes: NDArray[np.int32] | None
    bytes_per_token: float


def open_text(
    text: str, name: str, tokenizer: "Tokenizer", sequence_length: int, batch_size: int
) -> EvalData:
    """Return the batches of a text.

    Args:
        name: the text's file, for messages.
        sequence_length: tokens per sequence.
        batch_size: sequences per batch.

    Raises:
        UserError: the text is empty.
    """
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    if not ids:
        raise UserError(f"{name}: the file is empty; give a file with text")
    # An end-of-text token comes first, as before every document in training: the first token of
    # the text is predicted too.
    stream = np.array([eos_id(tokenizer), *ids])
    return EvalData(
        partial(stream_batches, lambda a, b: stream[a:b], len(stream), sequence_length, batch_size),
        token_byte_lengths(tokenizer),
        len(text.encode()) / len(ids),
    )


def open_split(
    path: Path, split: str, tokenizer: "Tokenizer", sequence_length: int, batch_size: int
) -> EvalData:
    """Return the batches of a split, after comparing the dataset with its checksums.

    Args:
        path: a token dataset or an instruction dataset.
        split: one of ``SPLITS``.
        tokenizer: the model's.
        sequence_length: tokens per sequence.
        batch_size: sequences per batch.

    Raises:
        UserError: there is no such dataset or split, it was made with another tokenizer, or the
            split is too small.
        Damaged: a file differs from its checksum.
    """
    if split not in SPLITS:
        raise UserError(f"{path}: has no split {split}; choose one of {', '.join(SPLITS)}")
    if is_instructions(path):
        return _open_examples(path, split, tokenizer, sequence_length, batch_size)
    fingerprint = tokenizer_fingerprint(tokenizer)
    dataset = open_dataset(path, tokenizer_fingerprint=fingerprint, verify=True)
    tokens = dataset.splits[split].tokens
    if tokens < 2:
        raise UserError(f"{path}: the {split} split holds no text; choose another --split")
    return EvalData(
        partial(stream_batches, dataset.splits[split].slice, tokens, sequence_length, batch_size),
        token_byte_lengths(tokenizer),
        dataset.manifest.splits[split].bytes / tokens,
    )


def _open_examples(
    path: Path, split: str, tokenizer: "Tokenizer", sequence_length: int, batch_size: int
) -> EvalData:
    dataset = open_instructions(path, verify=True)
    fingerprint = tokenizer_fingerprint(tokenizer)
    require_same_tokenizer(path, dataset.manifest.tokenizer_fingerprint, fingerprint)
    sequences = pack(dataset.splits[split], sequence_length, seed=0)
    if not sequences.num_sequences:
        raise UserError(
            f"{path}: the {split} split holds no example of at most {sequence_length} tokens; "
            "choose another --split"
        )
    if sequences.left_out:
        warn(
            f"{path}: {sequences.left_out:,} examples of the {split} split are longer than "
            f"{sequence_length} tokens and are left out"
        )
    counts = dataset.manifest.splits[split]
    ids = np.arange(sequences.num_sequences)
    return EvalData(
        partial(sequence_batches, sequences, ids, batch_size),
        token_byte_lengths(tokenizer),
        counts.trained_bytes / max(1, counts.trained_tokens),
    )
