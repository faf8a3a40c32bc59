"""Open a token dataset: splits of text or of instructions, read when they are needed."""

import itertools
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.data.dataset_manifest import (
    TOKENIZER,
    DatasetManifest,
    Shard,
    Split,
    damaged,
    manifest_file,
    read_dataset_manifest,
)
from minigpt_cli.data.file_checks import FileState, file_states, problems
from minigpt_cli.data.shard_files import ShardFiles
from minigpt_cli.data.verification import changed_content, recall, remember


@dataclass(frozen=True)
class ArrayShard:
    """An array in the place of a split's only file."""

    array: NDArray[Any]

    @property
    def dtype(self) -> np.dtype:
        """Data type of the entries."""
        return self.array.dtype

    def read(self, shard: int, start: int, out: NDArray[Any]) -> None:
        """Fill ``out`` [n] with the entries from position ``start`` on."""
        assert shard == 0, shard
        out[:] = self.array[start : start + len(out)]


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of one split, as if its shards were one array.

    A split of instructions also has a loss mask and document offsets. Each of its documents has at
    least two tokens. The loss never counts the first one and counts at least one other.

    Attributes:
        directory: the dataset's directory.
        shards: the files with the tokens, in order.
        vocab_size: every token is below it.
        eos_id: id of the end-of-text token.
        entries: the tokens in the shards.
        loss_mask: one shard of bool, True for a token that the loss counts; None for text.
        offsets: int64 [documents + 1], where each document begins, and the end of the last one;
            None for text.
    """

    directory: Path
    shards: tuple[Shard, ...]
    vocab_size: int
    eos_id: int
    entries: ShardFiles | ArrayShard = field(repr=False)
    loss_mask: ShardFiles | ArrayShard | None = field(default=None, repr=False)
    offsets: NDArray[np.int64] | None = field(default=None, repr=False)

    @cached_property
    def _starts(self) -> list[int]:
        """The tokens before each shard, and in all of them: [shards + 1]."""
        return list(itertools.accumulate((shard.tokens for shard in self.shards), initial=0))

    @property
    def tokens(self) -> int:
        """Tokens in the split."""
        return self._starts[-1]

    def num_sequences(self, sequence_length: int) -> int:
        """Return the number of sequences of ``sequence_length + 1`` tokens.

        Neighbours share one token: the last target of one is the first input of the next.
        """
        assert sequence_length > 0, sequence_length
        return max(0, (self.tokens - 1) // sequence_length)

    def gather(self, ids: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
        """Read sequences by number.

        Args:
            ids: int64 [n], in [0, ``num_sequences(sequence_length)``).
            sequence_length: predicted tokens of a sequence.

        Returns:
            int64 [n, sequence_length + 1].

        Raises:
            Damaged: a token isn't in the vocabulary, or a file isn't as recorded.
        """
        ids = np.asarray(ids, dtype=np.int64)
        assert ids.ndim == 1, ids.shape
        available = self.num_sequences(sequence_length)
        assert not len(ids) or (ids.min() >= 0 and ids.max() < available), (ids, available)
        found = np.empty((len(ids), sequence_length + 1), dtype=self.entries.dtype)
        starts = (ids * sequence_length).tolist()
        for sequence, start in zip(found, starts, strict=True):
            self._fill(sequence, start)
        if found.size and found.max() >= self.vocab_size:
            at, column = divmod(int(found.argmax()), sequence_length + 1)
            self._reject(starts[at] + column, int(found.max()))
        return found.astype(np.int64)

    def slice(self, start: int, stop: int) -> NDArray[np.int64]:
        """Read the tokens at ``start <= position < stop``.

        Returns:
            int64 [stop - start].

        Raises:
            Damaged: a token isn't in the vocabulary, or a file isn't as recorded.
        """
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        found = np.empty(stop - start, dtype=self.entries.dtype)
        if len(found):
            self._fill(found, start)
            if found.max() >= self.vocab_size:
                self._reject(start + int(found.argmax()), int(found.max()))
        return found.astype(np.int64)

    def document(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Read one document of a split of instructions.

        Returns:
            Its tokens, int64 [n], and its loss mask, bool [n].

        Raises:
            Damaged: a token isn't in the vocabulary, or a file isn't as recorded.
        """
        assert self.loss_mask is not None, "a split of text"
        assert self.offsets is not None, "a split of text"
        assert 0 <= index < len(self.offsets) - 1, (index, len(self.offsets) - 1)
        start, stop = self.offsets[index : index + 2].tolist()
        loss_mask = np.empty(stop - start, dtype=np.bool_)
        self.loss_mask.read(0, start, loss_mask)
        return self.slice(start, stop), loss_mask

    def locate(self, token_offset: int) -> tuple[str, int]:
        """Return (shard's file name, offset in it) of the split's token at ``token_offset``."""
        assert 0 <= token_offset < self.tokens, (token_offset, self.tokens)
        index = bisect_right(self._starts, token_offset) - 1
        return self.shards[index].file, token_offset - self._starts[index]

    def _fill(self, out: NDArray[Any], start: int) -> None:
        """Fill ``out`` with the tokens from position ``start`` on."""
        index = bisect_right(self._starts, start) - 1
        done = 0
        while done < len(out):
            # bisect skips empty shards at the start; here their part is empty
            part = out[done : done + self._starts[index + 1] - start]
            if len(part):
                self.entries.read(index, start - self._starts[index], part)
            done, start, index = done + len(part), start + len(part), index + 1

    def _reject(self, token_offset: int, token: int) -> None:
        file, offset = self.locate(token_offset)
        raise damaged(
            self.directory / file,
            f"token {token} at offset {offset} is outside the vocabulary of {self.vocab_size}",
        )


@dataclass(frozen=True)
class TokenDataset:
    """An open dataset.

    Attributes:
        path: its directory.
        manifest: the content of its ``dataset.json``.
        splits: "train" and "val".
    """

    path: Path
    manifest: DatasetManifest
    splits: dict[str, TokenSplit]

    @property
    def tokenizer_file(self) -> Path:
        """The tokenizer that the dataset was made with."""
        return self.path / TOKENIZER


def open_dataset(
    path: str | Path,
    *,
    tokenizer_fingerprint: str | None = None,
    verify: bool = False,
    states: dict[str, FileState] | None = None,
) -> TokenDataset:
    """Open the token dataset in the directory ``path``.

    Checks the manifest, the tokenizer, the offsets, and the presence, size, data type and length of
    every file.

    Args:
        path: the dataset's directory.
        tokenizer_fingerprint: of the tokenizer that the dataset must have been made with.
        verify: check every file's sha256 too, unless it was checked before and hasn't changed.
        states: of the files when their sha256 was checked. A file that has changed since is checked
            when it is read.

    Raises:
        UserError: ``path`` isn't a finished dataset, or was made with another tokenizer.
        Damaged: a file isn't as recorded.
    """
    path = Path(path)
    manifest = read_dataset_manifest(path)
    made_with = manifest.tokenizer_fingerprint
    if tokenizer_fingerprint not in (None, made_with):
        raise UserError(
            f"{path} was made with another tokenizer ({made_with[:12]}, the model's is "
            f"{str(tokenizer_fingerprint)[:12]}): give a dataset that was made with the model's "
            "(`minigpt tokenize --tokenizer MODEL/tokenizer.json`)"
        )
    if states is None:
        states = file_states(path, manifest)  # first: later changes are noticed
    found = problems(path, manifest)
    if verify and not found:
        known = recall(path, manifest, states)
        found = changed_content(path, manifest.files(), known)
        remember(path, manifest, states, found)
    for file, problem in found.items():
        raise damaged(path / file, problem)
    splits = {
        name: _open_split(path, manifest, split, states) for name, split in manifest.splits.items()
    }
    return TokenDataset(path, manifest, splits)


def verify_dataset(path: str | Path) -> dict[str, str]:
    """Compare every byte of a dataset with its manifest, and remember which files are as recorded.

    Returns:
        The name of each file that is missing, torn or changed -> what is wrong with it.

    Raises:
        UserError: ``path`` isn't a dataset.
    """
    path = Path(path)
    try:
        manifest = read_dataset_manifest(path)
    except Damaged as error:
        return {manifest_file(path).name: str(error)}
    states = file_states(path, manifest)
    found = problems(path, manifest)
    found |= changed_content(path, manifest.files(), known=found)
    remember(path, manifest, states, found)
    in_order = (TOKENIZER, *(shard.file for shard, _ in manifest.files()))
    return {file: found[file] for file in in_order if file in found}


def split_in_memory(
    tokens: NDArray[Any],
    *,
    vocab_size: int,
    eos_id: int,
    loss_mask: NDArray[np.bool_] | None = None,
    offsets: NDArray[np.int64] | None = None,
) -> TokenSplit:
    """Return a split of the integer array ``tokens`` [n], without a file."""
    shard = Shard("tokens", len(tokens), tokens.nbytes, "")
    return TokenSplit(
        Path("memory"),
        (shard,),
        vocab_size,
        eos_id,
        ArrayShard(tokens),
        None if loss_mask is None else ArrayShard(loss_mask),
        offsets,
    )


def _open_split(
    path: Path, manifest: DatasetManifest, split: Split, states: dict[str, FileState]
) -> TokenSplit:
    loss_mask = offsets = None
    if split.loss_mask is not None and split.offsets is not None:
        loss_mask = ShardFiles(path, (split.loss_mask,), "bool", states)
        offsets = np.empty(split.offsets.tokens, dtype=np.int64)
        ShardFiles(path, (split.offsets,), "int64", states).read(0, 0, offsets)
        # Cheap, and with wrong offsets documents would begin in the middle of others.
        if (
            not len(offsets)
            or offsets[0] != 0
            or offsets[-1] != split.tokens
            or (np.diff(offsets) < 2).any()
        ):
            raise damaged(path / split.offsets.file, "its offsets don't divide the tokens")
    return TokenSplit(
        path,
        split.shards,
        manifest.vocab_size,
        manifest.eos_id,
        ShardFiles(path, split.shards, manifest.dtype, states),
        loss_mask,
        offsets,
    )
