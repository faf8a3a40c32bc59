"""An instruction dataset on disk: examples of token ids, and which of them the loss counts for.

``instructions.json``, written last, makes a directory an instruction dataset. Per split there are
three arrays: ``train-tokens.npy``, ``train-trained.npy`` (bool, for each token) and
``train-offsets.npy`` (int64, where each example begins, and the end). `make_instructions` writes
them, `packing.pack` puts the examples into the rows that a model is trained on.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.core.files import write_atomically
from minigpt_cli.data.dataset_manifest import (
    SPLITS,
    TOKENIZER,
    Shard,
    damaged,
    sealed,
    shard_problem,
    tokenizer_problem,
    unsealed,
)

FORMAT = 1
INSTRUCTIONS = "instructions.json"
ARRAYS = ("tokens", "trained", "offsets")

_AGAIN = "make it again from its source"


@dataclass(frozen=True)
class ExampleFiles:
    """What one split holds. ``files`` are those of ``ARRAYS``, in that order; the ``tokens`` of
    each are its array's length.

    ``trained_tokens`` are those that the loss counts for, ``trained_bytes`` the UTF-8 bytes of
    their text: completions, or answers as the chat template writes them, end markers included.
    """

    files: tuple[Shard, ...]
    examples: int
    tokens: int
    trained_tokens: int
    trained_bytes: int


@dataclass(frozen=True)
class InstructionManifest:
    """``instructions.json``. ``settings`` is what tells whether a dataset has been made before.

    ``chat_template`` is the one that conversations were rendered with, None when none was given;
    ``malformed`` counts the records that were passed over.
    """

    splits: dict[str, ExampleFiles]
    eos_id: int
    dtype: str
    vocab_size: int
    tokenizer_fingerprint: str
    tokenizer_sha256: str
    chat_template: str | None
    source: dict[str, Any]
    malformed: int
    settings: dict[str, Any]
    minigpt_version: str
    format: int = FORMAT

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over every array of every split and the tokenizer: same value, same data."""
        parts = [shard.sha256 for split in SPLITS for shard in self.splits[split].files]
        return hashlib.sha256(
            " ".join([self.tokenizer_fingerprint, self.dtype, *parts]).encode()
        ).hexdigest()


@dataclass(frozen=True)
class ExampleSplit:
    """The examples of one split, memory-mapped.

    ``tokens`` and ``trained``: 1-D, of one length; ``offsets``: int64 [examples + 1]. Every example
    has at least two tokens; its first is never trained, at least one other is.
    """

    directory: Path
    name: str
    vocab_size: int
    eos_id: int
    tokens: NDArray[Any] = field(repr=False)
    trained: NDArray[np.bool_] = field(repr=False)
    offsets: NDArray[np.int64] = field(repr=False)

    @property
    def examples(self) -> int:
        return len(self.offsets) - 1

    def example(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return (tokens int64 [n], trained bool [n]) of one example.

        Raises ``Damaged`` when a token isn't in the vocabulary.
        """
        assert 0 <= index < self.examples, (index, self.examples)
        start, end = self.offsets[index : index + 2].tolist()
        tokens = self.tokens[start:end].astype(np.int64)
        if tokens.max() >= self.vocab_size:
            raise _damaged(
                self.directory / f"{self.name}-tokens.npy",
                f"token {tokens.max()} at offset {start + int(tokens.argmax())} is outside the "
                f"vocabulary of {self.vocab_size}",
            )
        return tokens, self.trained[start:end]


@dataclass(frozen=True)
class InstructionDataset:
    path: Path
    manifest: InstructionManifest
    splits: dict[str, ExampleSplit]

    @property
    def tokenizer_file(self) -> Path:
        return self.path / TOKENIZER


def is_instructions(path: str | Path) -> bool:
    """Whether the directory ``path`` says of itself that it is an instruction dataset."""
    return (Path(path) / INSTRUCTIONS).is_file()


def open_instructions(path: str | Path, verify: bool = False) -> InstructionDataset:
    """Open the instruction dataset in the directory ``path``.

    Always checked: the manifest, every array's presence, size, data type and length, the offsets,
    and the tokenizer. With ``verify`` every array's sha256 too, at the cost of reading all of it.

    Raises ``UserError`` when ``path`` isn't an instruction dataset; ``Damaged``, naming the file,
    when something isn't as recorded.
    """
    path = Path(path)
    manifest = read_instructions(path)
    for file, problem in _problems(path, manifest, verify):
        raise _damaged(path / file, problem)
    splits = {name: _split(path, name, manifest) for name in SPLITS}
    return InstructionDataset(path, manifest, splits)


def verify_instructions(path: str | Path) -> list[str]:
    """Return the names of the dataset's files that are missing, torn or changed; empty when it is
    whole.

    Reads every byte. Raises ``UserError`` when ``path`` isn't an instruction dataset.
    """
    path = Path(path)
    try:
        manifest = read_instructions(path)
    except Damaged:
        return [INSTRUCTIONS]
    return [file for file, _ in _problems(path, manifest, verify=True)]


def read_instructions(path: Path) -> InstructionManifest:
    """Read ``instructions.json``; ``UserError`` when there is none, ``Damaged`` when it isn't as it
    was written.
    """
    file = path / INSTRUCTIONS
    try:
        record = unsealed(file, FORMAT, _AGAIN)
    except (FileNotFoundError, NotADirectoryError):
        hint = f"there is no {INSTRUCTIONS} in it" if path.exists() else "no such directory"
        raise UserError(f"{path} is not an instruction dataset: {hint}") from None
    try:
        splits = {
            name: ExampleFiles(tuple(Shard(**shard) for shard in split.pop("files")), **split)
            for name, split in ((name, record["splits"].pop(name)) for name in SPLITS)
        }
        return InstructionManifest(**record | {"splits": splits})
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(file, f"an entry is missing or of the wrong type ({error})") from None


def write_instructions(path: Path, manifest: InstructionManifest) -> None:
    """Make ``path`` an instruction dataset. The arrays must be on disk already."""
    write_atomically(path / INSTRUCTIONS, sealed(asdict(manifest)))


def array_type(array: str, dtype: str) -> str:
    """Return the data type of one of ``ARRAYS`` in a dataset whose tokens are of ``dtype``."""
    return {"tokens": dtype, "trained": "bool", "offsets": "int64"}[array]


def _problems(path: Path, manifest: InstructionManifest, verify: bool) -> list[tuple[str, str]]:
    """Return (file, what is wrong with it) for every file that isn't as recorded."""
    found = []
    problem = tokenizer_problem(
        path / TOKENIZER, manifest.tokenizer_sha256, manifest.tokenizer_fingerprint
    )
    if problem:
        found.append((TOKENIZER, problem))
    for split in manifest.splits.values():
        for array, shard in zip(ARRAYS, split.files, strict=True):
            dtype = array_type(array, manifest.dtype)
            problem = shard_problem(path / shard.file, shard, dtype, verify)
            if problem:
                found.append((shard.file, problem))
    return found


def _split(path: Path, name: str, manifest: InstructionManifest) -> ExampleSplit:
    arrays = []
    for shard in manifest.splits[name].files:
        try:
            # A plain view: slicing numpy's memmap class costs several times as much
            arrays.append(np.load(path / shard.file, mmap_mode="r").view(np.ndarray))
        except (OSError, ValueError) as error:
            raise _damaged(path / shard.file, str(error)) from None
    tokens, trained, offsets = arrays
    # Cheap beside what a wrong one would do: examples would begin in the middle of others
    if offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 2).any():
        raise _damaged(path / f"{name}-offsets.npy", "its offsets don't divide the tokens")
    return ExampleSplit(
        path, name, manifest.vocab_size, manifest.eos_id, tokens, trained, np.array(offsets)
    )


def _damaged(file: Path, problem: str) -> Damaged:
    return damaged(file, problem, _AGAIN)
