"""Open a dataset as sequences of one length, for training and for evaluation.

Text is cut into sequences, documents of instructions are packed into them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_cli.core.console import log, warn
from minigpt_cli.core.errors import UserError
from minigpt_cli.data.dataset import TokenDataset, open_dataset
from minigpt_cli.data.dataset_manifest import SPLITS
from minigpt_cli.data.loader import Gathered, Sequences, TokenSequences
from minigpt_cli.data.packing import PackedSequences, pack
from minigpt_cli.recipe import Recipe


@dataclass(frozen=True)
class TrainingData:
    """Both splits of a run's dataset, in sequences of the recipe's length.

    Attributes:
        train: the training split.
        val: the validation split; None if it has no sequence.
        bytes_per_token: UTF-8 bytes per validation token that the loss counts.
        tokenizer_file: the dataset's tokenizer.
        vocab_size: largest id of the tokenizer plus one.
        chat_template: the template that conversations were rendered with.
        fingerprints: of the tokenizer and of all tokens; a run goes on only with the same ones.
    """

    train: Sequences
    val: Sequences | None
    bytes_per_token: float
    tokenizer_file: Path
    vocab_size: int
    chat_template: str | None
    fingerprints: dict[str, Any]


@dataclass(frozen=True)
class EvalData:
    """One split of a dataset, for evaluation.

    Attributes:
        sequences: the split in sequences of one length.
        bytes_per_token: UTF-8 bytes per token that the loss counts.
    """

    sequences: Sequences
    bytes_per_token: float

    def batches(self, batch_size: int) -> Iterator[Gathered]:
        """Yield every target of the split once, up to ``batch_size`` sequences at a time.

        The last batch of a text is its tail, shorter than a sequence.
        """
        sequences, count = self.sequences, self.sequences.num_sequences
        for first in range(0, count, batch_size):
            yield sequences.gather(np.arange(first, min(first + batch_size, count)))
        if isinstance(sequences, TokenSequences):
            start = count * sequences.sequence_length
            tail = sequences.split.slice(start, sequences.split.tokens)[None]
            if tail.shape[1] > 1:
                yield tail[:, :-1], tail[:, 1:], None


def verify_data(recipe: Recipe) -> None:
    """Compare every byte of a recipe's dataset with its manifest; this may take minutes.

    Raises:
        UserError: there is no dataset.
        Damaged: a file isn't as recorded.
    """
    open_dataset(recipe.data_path, verify=True)


def open_data(recipe: Recipe) -> TrainingData:
    """Open a recipe's dataset, which must be there already.

    Raises:
        UserError: there is no dataset, or no sequence to train on in it.
        Damaged: a file isn't as recorded.
    """
    path, length = Path(recipe.data_path), recipe.train.sequence_length
    dataset = open_dataset(path)
    manifest = dataset.manifest
    train, val = (_sequences(dataset, name, length, recipe.train.seed) for name in SPLITS)
    for name, sequences in (("train", train), ("val", val)):
        if isinstance(sequences, PackedSequences):
            log(
                f"{path} {name}: {sequences.num_documents:,} examples in "
                f"{sequences.num_sequences:,} sequences, {sequences.fill:.0%} full"
            )
    if not train.num_sequences:
        raise UserError(
            f"{path}: the training split has no sequence of train.sequence_length {length}, "
            f"{_reason(train)}: use more data, or another length"
        )
    if not val.num_sequences:
        warn(
            f"{path}: the validation split has no sequence of train.sequence_length {length}, "
            f"{_reason(val)}: nothing is evaluated"
        )
    return TrainingData(
        train=train,
        val=val if val.num_sequences else None,
        bytes_per_token=manifest.splits["val"].bytes_per_token,
        tokenizer_file=dataset.tokenizer_file,
        vocab_size=manifest.vocab_size,
        chat_template=manifest.chat_template,
        fingerprints={
            "tokenizer": manifest.tokenizer_fingerprint,
            "content": manifest.fingerprint,
        },
    )


def open_eval_sequences(
    path: Path, split: str, sequence_length: int, tokenizer_fingerprint: str
) -> EvalData:
    """Open one split of the dataset in the directory ``path`` for evaluation; verify every byte.

    Args:
        path: the dataset's directory.
        split: "train" or "val".
        sequence_length: predicted tokens of a sequence.
        tokenizer_fingerprint: of the model's tokenizer.

    Raises:
        UserError: there is no dataset or no such split, the dataset was made with another
            tokenizer, or the split has nothing to evaluate on.
        Damaged: a file isn't as recorded.
    """
    if split not in SPLITS:
        raise UserError(f"{path}: has no split {split}, but {', '.join(SPLITS)}")
    dataset = open_dataset(path, tokenizer_fingerprint=tokenizer_fingerprint, verify=True)
    sequences = _sequences(dataset, split, sequence_length, seed=0)
    packed = isinstance(sequences, PackedSequences)
    if sequences.num_sequences < 1 if packed else sequences.split.tokens < 2:
        least = f"an example of at most {sequence_length} tokens" if packed else "2 tokens"
        raise UserError(f"{path}, {split}: nothing to evaluate on, it needs at least {least}")
    return EvalData(sequences, dataset.manifest.splits[split].bytes_per_token)


def _sequences(dataset: TokenDataset, name: str, length: int, seed: int) -> Sequences:
    split = dataset.splits[name]
    if not dataset.manifest.has_loss_mask:
        return TokenSequences(split, length)
    packed = pack(split, length, seed)
    if packed.num_too_long and packed.num_documents:
        whole = packed.num_too_long + packed.num_documents
        warn(
            f"{dataset.path} {name}: {packed.num_too_long:,} of {whole:,} examples are longer than "
            f"{length} tokens and are skipped"
        )
    return packed


def _reason(sequences: Sequences) -> str:
    """Return why a split has no sequence."""
    if isinstance(sequences, TokenSequences):
        return f"its {sequences.split.tokens:,} tokens are too few"
    if not sequences.num_too_long:
        return "it holds no examples"
    assert sequences.split.offsets is not None
    lengths = np.diff(sequences.split.offsets)
    shortest, longest = int(lengths.min()), int(lengths.max())
    if len(lengths) == 1:
        return f"its only example is longer ({longest:,} tokens)"
    return f"all its {len(lengths):,} examples are longer ({shortest:,} to {longest:,} tokens)"
