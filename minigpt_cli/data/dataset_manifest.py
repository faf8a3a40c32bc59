"""What is recorded about a token dataset: ``dataset.json``, written last, and the check against it.

``dataset.json`` makes a directory a dataset. It records every shard's token count, size and sha256,
and its own checksum, so that a missing, torn or changed file is found and named.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.core.files import sha256_of, write_atomically

FORMAT = 1
MANIFEST = "dataset.json"
TOKENIZER = "tokenizer.json"
JOURNAL = "journal.json"  # of an unfinished `tokenize`; gone once the manifest is there
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Shard:
    """One file of tokens. ``bytes_on_disk`` and ``sha256`` cover the whole file with its header."""

    file: str
    tokens: int
    bytes_on_disk: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """``bytes``: UTF-8 bytes of the documents' text, end-of-text tokens not counted."""

    shards: tuple[Shard, ...]
    tokens: int
    documents: int
    bytes: int


@dataclass(frozen=True)
class DatasetManifest:
    """``dataset.json``. ``settings`` is what `tokenize` compares to tell whether it has been run
    before.

    ``source_fingerprint`` covers the text of all documents in order, whatever files they came from;
    ``tokenizer_sha256`` covers the bytes of tokenizer.json, ``tokenizer_fingerprint`` what they
    mean.
    """

    splits: dict[str, Split]
    eos_id: int
    dtype: str
    vocab_size: int
    tokenizer_fingerprint: str
    tokenizer_sha256: str
    source: dict[str, Any]
    source_fingerprint: str
    bad_lines: int
    settings: dict[str, Any]
    minigpt_version: str
    format: int = FORMAT

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over every token of every split and the tokenizer: same value, same data."""
        parts = [shard.sha256 for split in SPLITS for shard in self.splits[split].shards]
        return hashlib.sha256(
            " ".join([self.tokenizer_fingerprint, self.dtype, *parts]).encode()
        ).hexdigest()


def read_dataset_manifest(path: Path) -> DatasetManifest:
    """Read ``dataset.json``; ``UserError`` when there is none, ``Damaged`` when it isn't as it was
    written.
    """
    file = path / MANIFEST
    try:
        record = unsealed(file, FORMAT)
    except (FileNotFoundError, NotADirectoryError):
        if (path / JOURNAL).exists():
            hint = "its tokenization is unfinished: run the same `minigpt tokenize` again"
        elif path.exists():
            hint = f"there is no {MANIFEST} in it"
        else:
            where = "" if path.is_absolute() else f" in {Path.cwd()}"
            hint = (
                f"no such directory{where}; make it with `minigpt tokenize`, or name where it is: "
                "--set data.path=DIR, or --data DIR of eval"
            )
        raise UserError(f"{path} is not a token dataset: {hint}") from None
    try:
        splits = {
            name: Split(tuple(Shard(**shard) for shard in split.pop("shards")), **split)
            for name, split in ((name, record["splits"].pop(name)) for name in SPLITS)
        }
        return DatasetManifest(**record | {"splits": splits})
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(file, f"an entry is missing or of the wrong type ({error})") from None


def write_dataset_manifest(path: Path, manifest: DatasetManifest) -> None:
    """Make ``path`` a dataset. The shards must be on disk already."""
    write_atomically(path / MANIFEST, sealed(asdict(manifest)))


def sealed(record: dict[str, Any]) -> bytes:
    """Return a manifest as JSON that tells, by a checksum, whether it was changed."""
    return (json.dumps(record | {"checksum": _checksum(record)}, indent=1) + "\n").encode()


def unsealed(file: Path, newest: int, again: str = "tokenize again") -> dict[str, Any]:
    """Return the record that was `sealed` into ``file``.

    Raises ``FileNotFoundError`` or ``NotADirectoryError`` when there is no file, ``UserError`` for
    a format beyond ``newest``, ``Damaged`` (see `damaged`) when it isn't as it was written.
    """
    try:
        record = json.loads(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"{file} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise damaged(file, f"not valid JSON ({error})", again) from None
    try:
        if record["format"] > newest:
            raise UserError(
                f"{file.parent} has format {record['format']}, newer than the {newest} that this "
                "minigpt reads: update minigpt"
            )
        if record.pop("checksum") != _checksum(record):
            raise damaged(file, "its content doesn't match its checksum", again)
    except (KeyError, TypeError, AttributeError) as error:
        raise damaged(file, f"an entry is missing or of the wrong type ({error})", again) from None
    assert isinstance(record, dict)
    return record


def problems(path: Path, manifest: DatasetManifest, verify: bool) -> list[tuple[str, str]]:
    """Return (file, what is wrong with it) for every file that isn't as recorded."""
    found = []
    problem = tokenizer_problem(
        path / TOKENIZER, manifest.tokenizer_sha256, manifest.tokenizer_fingerprint
    )
    if problem:
        found.append((TOKENIZER, problem))
    for split in manifest.splits.values():
        for shard in split.shards:
            problem = shard_problem(path / shard.file, shard, manifest.dtype, verify)
            if problem:
                found.append((shard.file, problem))
    return found


def tokenizer_problem(file: Path, sha256: str, meaning: str) -> str | None:
    """Return what is wrong with a dataset's tokenizer.json, None when it has this sha256, or else
    this fingerprint.
    """
    from minigpt_cli.data.tokenizer import load_tokenizer, tokenizer_fingerprint

    try:
        if hashlib.sha256(file.read_bytes()).hexdigest() == sha256:
            return None
        if tokenizer_fingerprint(load_tokenizer(file)) == meaning:
            return None  # written anew by some other tool, but the same tokenizer
    except OSError as error:
        return error.strerror or str(error)
    except UserError:
        pass
    return "is not the tokenizer that the dataset was made with"


def shard_problem(file: Path, shard: Shard, dtype: str, verify: bool) -> str | None:
    """Return what is wrong with a shard's file, None when it is as recorded."""
    try:
        size = file.stat().st_size
        if size != shard.bytes_on_disk:
            return f"is {size:,} bytes instead of {shard.bytes_on_disk:,}"
        with file.open("rb") as stream:
            if np.lib.format.read_magic(stream) != (1, 0):
                return "its header is not that of a shard"
            header = np.lib.format.read_array_header_1_0(stream)
        if header != ((shard.tokens,), False, np.dtype(dtype)):
            return f"its header doesn't say {shard.tokens:,} tokens of {dtype}"
        if verify and sha256_of(file) != shard.sha256:
            return "its content doesn't match its sha256"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read ({error.strerror})"
    except ValueError:
        return "its header is not that of a shard"
    return None


def damaged(file: Path, problem: str, again: str = "tokenize again") -> Damaged:
    """The error of a file that isn't as recorded; ``again`` says how a dataset is made anew."""
    return Damaged(
        f"{file}: {problem}; restore it from a copy, or delete {file.parent} and {again}"
    )


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
