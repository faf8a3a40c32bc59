"""The manifest of a token dataset: ``dataset.json``.

A directory with a manifest is a dataset, so the manifest is written last. It records the size and
sha256 of every file and its own checksum: a missing, torn or changed file is found and named.

Format 1 is for text. Format 2 is for instructions: each split also has a loss mask and document
offsets. Datasets of instructions once had a manifest of their own, ``instructions.json``; it is
still read.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.core.files import json_checksum, write_atomically
from minigpt_cli.core.reading import build, parse_json, read_bytes

FORMAT = 2
SPLITS = ("train", "val")

# File names in a dataset's directory.
MANIFEST = "dataset.json"
OLD_INSTRUCTIONS = "instructions.json"
TOKENIZER = "tokenizer.json"
JOURNAL = "journal.json"  # only while `tokenize` is unfinished
LOCK = ".lock"
TEMPORARY = tuple(f".{name}.tmp" for name in (MANIFEST, TOKENIZER, JOURNAL))  # before a rename


@dataclass(frozen=True)
class Shard:
    """One 1-D .npy file.

    Attributes:
        file: its name in the dataset's directory.
        tokens: the entries in its array.
        bytes_on_disk: its size, header included.
        sha256: of the whole file, in hex.
    """

    file: str
    tokens: int
    bytes_on_disk: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The files and counts of one split.

    Attributes:
        shards: the token ids, in order.
        tokens: tokens in all shards.
        documents: documents in the split. In a dataset of instructions, each example is one.
        bytes: UTF-8 bytes of the text that the loss counts, without end-of-text tokens that
            `tokenize` appended.
        loss_mask: bool [tokens], True for a token that the loss counts. None: it counts all.
        offsets: int64 [documents + 1], where each document begins, and the end of the last one.
            None without a loss mask.
        loss_tokens: tokens that the loss counts. None: all of them.
    """

    shards: tuple[Shard, ...]
    tokens: int
    documents: int
    bytes: int
    loss_mask: Shard | None = None
    offsets: Shard | None = None
    loss_tokens: int | None = None

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token, over the tokens that the loss counts."""
        tokens = self.tokens if self.loss_tokens is None else self.loss_tokens
        return self.bytes / max(1, tokens)

    def files(self, dtype: str) -> list[tuple[Shard, str]]:
        """Return every file with its data type. ``dtype`` is that of the tokens."""
        found = [(shard, dtype) for shard in self.shards]
        if self.loss_mask is not None and self.offsets is not None:
            found += [(self.loss_mask, "bool"), (self.offsets, "int64")]
        return found


@dataclass(frozen=True)
class DatasetManifest:
    """The content of ``dataset.json``.

    Attributes:
        splits: by name, one for each of ``SPLITS``.
        eos_id: id of the end-of-text token.
        dtype: data type of the token ids, "uint16" or "uint32".
        vocab_size: largest id of the tokenizer plus one.
        tokenizer_fingerprint: see `tokenizer.tokenizer_fingerprint`.
        tokenizer_sha256: of the bytes of tokenizer.json, in hex.
        source: description of the source, as plain JSON values.
        source_fingerprint: covers the text of all documents in order, whatever files held them.
            Empty in a dataset of instructions.
        bad_lines: malformed lines, records or files that were skipped.
        settings: settings of the command that made the dataset. The same command run again
            compares them.
        minigpt_version: the version that made the dataset.
        chat_template: the template that conversations were rendered with.
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
    chat_template: str | None = None

    @property
    def has_loss_mask(self) -> bool:
        """True for a dataset of instructions, False for one of text."""
        return self.splits["train"].loss_mask is not None

    def files(self) -> list[tuple[Shard, str]]:
        """Return every file of every split with its data type."""
        return [each for name in SPLITS for each in self.splits[name].files(self.dtype)]

    @property
    def fingerprint(self) -> str:
        """Return the sha256 (hex) over the tokenizer and every file of every split."""
        hashes = [file.sha256 for file, _ in self.files()]
        parts = [self.tokenizer_fingerprint, self.dtype, *hashes]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def token_dtype(vocab_size: int) -> str:
    """Return the data type of token ids below ``vocab_size``."""
    return "uint16" if vocab_size <= 65_536 else "uint32"


def manifest_file(path: Path) -> Path:
    """Return the manifest's path in the dataset directory ``path``, which may not exist."""
    old = path / OLD_INSTRUCTIONS
    return old if old.exists() and not (path / MANIFEST).exists() else path / MANIFEST


def is_dataset(path: Path) -> bool:
    """Return True if the directory ``path`` holds a finished dataset."""
    return manifest_file(path).exists()


def read_dataset_manifest(path: Path) -> DatasetManifest:
    """Read the manifest of the dataset in the directory ``path``.

    Raises:
        UserError: there is no manifest, or its format is newer than ``FORMAT``.
        Damaged: it is not as it was written.
    """
    file = manifest_file(path)
    if not file.exists():
        raise UserError(f"{path} is not a token dataset: {_why_not(path)}")
    content = read_bytes(file)
    try:
        record = parse_json(content, str(file), Damaged)
    except Damaged as error:
        raise Damaged(f"{error}; {_way_out(file)}") from None
    try:
        version = build(int, record["format"], "format")
        if version > FORMAT:
            raise UserError(
                f"{path} has format {version}, newer than the {FORMAT} that this minigpt "
                "reads: update minigpt"
            )
        if record.pop("checksum") != json_checksum(record):
            raise damaged(file, "its content doesn't match its checksum")
        del record["format"]
        if file.name == OLD_INSTRUCTIONS:
            record = _converted(record)
        record["splits"] = {name: record["splits"][name] for name in SPLITS}
        manifest: DatasetManifest = build(DatasetManifest, record)
        _check(manifest)
        return manifest
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(file, f"an entry is missing or of the wrong type ({error})") from None


def check_bare_name(name: str) -> None:
    """Check that the name of a recorded file has no directory in it.

    Raises:
        ValueError: It doesn't.
    """
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a file")


def write_dataset_manifest(path: Path, manifest: DatasetManifest) -> None:
    """Make the directory ``path`` a dataset. All other files must be on disk already."""
    record = _without_none(asdict(manifest))
    record["splits"] = {name: _without_none(split) for name, split in record["splits"].items()}
    record["format"] = FORMAT if manifest.has_loss_mask else 1
    record["checksum"] = json_checksum(record)
    write_atomically(path / MANIFEST, (json.dumps(record, indent=1) + "\n").encode())


def damaged(file: Path, problem: str) -> Damaged:
    """Return the error for a file of a dataset that is not as recorded."""
    return Damaged(f"{file}: {problem}; {_way_out(file)}")


def _way_out(file: Path) -> str:
    return f"restore it from a copy, or delete {file.parent} and make it again"


def _check(manifest: DatasetManifest) -> None:
    """Check what the types don't say. Raise ValueError if a value is wrong."""
    if manifest.dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype is {manifest.dtype!r}")
    for split in manifest.splits.values():
        masks = (split.loss_mask is not None, split.offsets is not None)
        if masks != (manifest.has_loss_mask,) * 2:
            raise ValueError("a loss mask or offsets are missing")
        for shard, _ in split.files(manifest.dtype):
            check_bare_name(shard.file)
        if split.tokens != sum(shard.tokens for shard in split.shards):
            raise ValueError("tokens is not the sum over the shards")


def _why_not(path: Path) -> str:
    """Return why ``path`` holds no manifest, and the way out."""
    if (path / JOURNAL).exists():
        return "its tokenization is unfinished: run the same `minigpt tokenize` again"
    if path.exists():
        return f"there is no {MANIFEST} in it"
    where = "" if path.is_absolute() else f" in {Path.cwd()}"
    return (
        f"no such directory{where}; make it with `minigpt tokenize`, or give another directory "
        "(--set data.path=DIR; eval: --data DIR)"
    )


def _converted(record: dict[str, Any]) -> dict[str, Any]:
    """Convert the content of ``instructions.json`` to that of ``dataset.json``."""
    splits = {}
    for name, split in record["splits"].items():
        tokens, loss_mask, offsets = split["files"]
        splits[name] = {
            "shards": [tokens],
            "tokens": split["tokens"],
            "documents": split["examples"],
            "bytes": split["trained_bytes"],
            "loss_mask": loss_mask,
            "offsets": offsets,
            "loss_tokens": split["trained_tokens"],
        }
    bad_lines = record.pop("malformed")
    return record | {"splits": splits, "bad_lines": bad_lines, "source_fingerprint": ""}


def _without_none(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if value is not None}
