"""The token dataset as the rest of the program sees it: memory-mapped splits of fixed windows."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.data.dataset_manifest import (
    MANIFEST,
    TOKENIZER,
    DatasetManifest,
    Shard,
    damaged,
    problems,
    read_dataset_manifest,
)

_OPEN_SHARDS = 256  # each memory map holds a file descriptor, and 1,024 is a common limit


@dataclass(frozen=True)
class TokenSplit:
    """The tokens of one split, as if its shards were one array."""

    directory: Path
    shards: tuple[Shard, ...]
    dtype: str
    vocab_size: int
    _starts: NDArray[np.int64] = field(repr=False)  # [shards + 1]: tokens before each shard
    _maps: dict[int, NDArray[Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def tokens(self) -> int:
        return int(self._starts[-1])

    def num_sequences(self, sequence_length: int) -> int:
        """Return how many windows of ``sequence_length + 1`` tokens there are at that stride.

        Neighbours share one token: the last target of one is the first input of the next.
        """
        assert sequence_length > 0, sequence_length
        return max(0, (self.tokens - 1) // sequence_length)

    def gather(self, ids: NDArray[np.int64], sequence_length: int) -> NDArray[np.int64]:
        """Return int64 [n, sequence_length + 1]: the windows with these numbers (int64 [n]).

        Raises ``Damaged`` when a token isn't in the vocabulary.
        """
        ids = np.asarray(ids, dtype=np.int64)
        assert ids.ndim == 1, ids.shape
        windows = self.num_sequences(sequence_length)
        assert not len(ids) or (ids.min() >= 0 and ids.max() < windows), (ids, windows)
        out = np.empty((len(ids), sequence_length + 1), dtype=np.int64)
        starts = ids * sequence_length
        indices = np.searchsorted(self._starts, starts, side="right") - 1
        for row, start, index in zip(out, starts.tolist(), indices.tolist(), strict=True):
            self._fill(row, start, index)
        if out.size and out.max() >= self.vocab_size:
            row_index, column = divmod(int(out.argmax()), sequence_length + 1)
            self._reject(int(starts[row_index]) + column, int(out.max()))
        return out

    def slice(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return int64 [stop - start]: the tokens at start <= position < stop of the split."""
        assert 0 <= start <= stop <= self.tokens, (start, stop, self.tokens)
        out = np.empty(stop - start, dtype=np.int64)
        if len(out):
            index = int(np.searchsorted(self._starts, start, side="right")) - 1
            self._fill(out, start, index)
            if out.max() >= self.vocab_size:
                self._reject(start + int(out.argmax()), int(out.max()))
        return out

    def locate(self, token_offset: int) -> tuple[str, int]:
        """Return (shard's file name, offset in it) of the split's token at ``token_offset``."""
        assert 0 <= token_offset < self.tokens, (token_offset, self.tokens)
        index = int(np.searchsorted(self._starts, token_offset, side="right")) - 1
        return self.shards[index].file, token_offset - int(self._starts[index])

    def _fill(self, out: NDArray[np.int64], start: int, index: int) -> None:
        """Fill ``out`` with the tokens from ``start`` on, which lies in the shard ``index``."""
        done = 0
        start -= int(self._starts[index])
        while done < len(out):
            tokens = self._shard(index)
            part = tokens[start : start + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            index, start = index + 1, 0

    def _shard(self, index: int) -> NDArray[Any]:
        tokens = self._maps.get(index)
        if tokens is None:
            file = self.directory / self.shards[index].file
            try:
                # A plain view: slicing numpy's memmap class costs several times as much
                tokens = np.load(file, mmap_mode="r").view(np.ndarray)
            except (OSError, ValueError) as error:
                raise damaged(file, str(error)) from None
            if len(tokens) != self.shards[index].tokens:
                raise damaged(file, f"holds {len(tokens)} tokens")
            if len(self._maps) >= _OPEN_SHARDS:
                self._maps.clear()
            self._maps[index] = tokens
        return tokens

    def _reject(self, token_offset: int, token: int) -> None:
        file, offset = self.locate(token_offset)
        raise damaged(
            self.directory / file,
            f"token {token} at offset {offset} is outside the vocabulary of {self.vocab_size}",
        )


@dataclass(frozen=True)
class TokenDataset:
    path: Path
    manifest: DatasetManifest
    splits: dict[str, TokenSplit]

    @property
    def tokenizer_file(self) -> Path:
        return self.path / TOKENIZER


def open_dataset(
    path: str | Path, *, tokenizer_fingerprint: str | None = None, verify: bool = False
) -> TokenDataset:
    """Open the token dataset in the directory ``path``.

    Always checked: the manifest, and every shard's presence, size, data type and length, and the
    tokenizer. With ``verify`` every shard's sha256 too, at the cost of reading all of it.

    Raises ``UserError`` when ``path`` isn't a (finished) dataset or was made with another tokenizer
    than the one with ``tokenizer_fingerprint``; ``Damaged``, naming the file, when something isn't
    as recorded.
    """
    path = Path(path)
    manifest = read_dataset_manifest(path)
    if tokenizer_fingerprint is not None:
        require_same_tokenizer(path, manifest.tokenizer_fingerprint, tokenizer_fingerprint)
    for file, problem in problems(path, manifest, verify):
        raise damaged(path / file, problem)
    splits = {}
    for name, split in manifest.splits.items():
        starts = np.cumsum([0] + [shard.tokens for shard in split.shards], dtype=np.int64)
        splits[name] = TokenSplit(path, split.shards, manifest.dtype, manifest.vocab_size, starts)
    return TokenDataset(path, manifest, splits)


def require_same_tokenizer(path: Path, made_with: str, wanted: str) -> None:
    """Raises ``UserError`` when a dataset was made with another tokenizer than is wanted."""
    if made_with != wanted:
        raise UserError(
            f"{path} was made with another tokenizer ({made_with[:12]}, not {wanted[:12]}); make "
            "it anew with this one, in another place"
        )


def verify_dataset(path: str | Path) -> list[str]:
    """Return the names of the dataset's files that are missing, torn or changed; empty when it is
    whole.

    Reads every byte. Raises ``UserError`` when ``path`` isn't a dataset.
    """
    path = Path(path)
    try:
        manifest = read_dataset_manifest(path)
    except Damaged:
        return [MANIFEST]
    return [file for file, _ in problems(path, manifest, verify=True)]
