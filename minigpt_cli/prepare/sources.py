"""Where documents come from: what a user names on the command line or in a recipe, made precise.

`documents.py` reads the documents of a ``Source``; this module only says which files they are in.
"""

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import UserError

KINDS = ("files", "jsonl", "parquet", "huggingface", "python-stdlib")

_COMPRESSED = (".gz", ".zst")
_JSONL = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".text", ".md", ".rst", ".py", ".log", ".tex", ".html", ".xml")
_FILE_KINDS = ("files", "jsonl", "parquet")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_STDLIB_LEFT_OUT = frozenset(
    ("test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__")
)


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    ``kind`` is one of ``KINDS``. ``path`` holds files, directories or glob patterns (``**`` crosses
    directories) for ``files``, ``jsonl`` and ``parquet``; exactly one local directory or Hub id for
    ``huggingface``; nothing for ``python-stdlib``. ``field`` names the text's field in JSONL,
    Parquet and Hugging Face datasets; ``split`` and ``config`` matter to ``huggingface`` only.
    """

    kind: str
    path: tuple[str, ...] = ()
    field: str = "text"
    split: str = "train"
    config: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"unknown kind of source {self.kind!r}; choose one of {', '.join(KINDS)}"
            )
        if self.kind == "python-stdlib":
            if self.path:
                raise UserError(f"python-stdlib takes no path, but got {', '.join(self.path)}")
        elif not self.path:
            raise UserError(f"a source of kind {self.kind} needs a path")
        elif not all(self.path):
            raise UserError("the name of a source is empty")
        elif self.kind == "huggingface" and len(self.path) != 1:
            raise UserError(
                "give one Hugging Face dataset (a directory or a Hub id) at a time, "
                f"not {len(self.path)}: {', '.join(self.path)}"
            )

    def describe(self) -> dict[str, Any]:
        """Return the source as plain JSON values, for ``dataset.json``."""
        described: dict[str, Any] = {"kind": self.kind, "path": list(self.path)}
        if self.kind in ("jsonl", "parquet", "huggingface"):
            described["field"] = self.field
        if self.kind == "huggingface":
            described |= {"split": self.split, "config": self.config}
        return described


def detect_source(
    arguments: list[str], field: str = "text", split: str = "train", config: str | None = None
) -> Source:
    """Return the source that the arguments of ``minigpt tokenize SOURCE...`` mean.

    ``python-stdlib`` is the standard library's source; an existing file, directory or glob pattern
    is read by its ending (.jsonl, .ndjson, .json: JSON lines; .parquet; anything else: plain text,
    one document per file; .gz and .zst are unpacked); a name like ``org/name`` that isn't there is
    a Hub id.

    Raises ``UserError`` for a path that doesn't exist, a pattern without matches, and mixed kinds.
    """
    if not arguments:
        raise UserError("no source given: name files, a directory, a Hub dataset, or python-stdlib")
    if "python-stdlib" in arguments and len(arguments) > 1:
        raise UserError("python-stdlib can't be mixed with other sources in one dataset")
    kinds: dict[str, str] = {}  # kind -> the first argument of that kind
    for argument in arguments:
        kind = argument if argument == "python-stdlib" else _kind_of(argument)
        kinds.setdefault(kind, argument)
    if len(kinds) > 1:
        mixed = ", ".join(f"{argument} ({kind})" for kind, argument in kinds.items())
        raise UserError(f"sources of different kinds can't go into one dataset: {mixed}")
    kind = next(iter(kinds))
    if kind != "huggingface" and (split != "train" or config is not None):
        raise UserError(f"--split and --config are for Hugging Face datasets, not for {kind}")
    if kind == "python-stdlib":
        return Source(kind)
    return Source(kind, tuple(arguments), field, split, config)


def source_files(source: Source) -> list[Path]:
    """Return the files of a source of kind files, jsonl, parquet or python-stdlib, in reading
    order.

    Each pattern's and each directory's files are sorted by name; the arguments keep their order; a
    file that is named twice is read once. Raises ``UserError`` for what doesn't exist.
    """
    if source.kind == "python-stdlib":
        return _stdlib_files()
    assert source.kind in _FILE_KINDS, source.kind
    found: dict[Path, None] = {}
    for argument in source.path:
        for file in _expand(argument, source.kind):
            found.setdefault(file)
    return list(found)


def local_folder(source: Source) -> Path | None:
    """Return the directory of a ``huggingface`` source, None when it is a Hub id."""
    folder = Path(source.path[0]).expanduser()
    return folder if folder.is_dir() else None


def listing(source: Source) -> tuple[str, int | None]:
    """Return (sha256 hex over the names and sizes of the source's files, their total bytes).

    A cheap answer to "is this the source that was read before?": names are relative to the common
    folder, so that a moved corpus stays the same, and modification times are left out, so that a
    fresh checkout does too. For a Hub id it covers the id alone, and the size is None. What was
    really read is covered by the content fingerprint in ``dataset.json``.
    """
    if source.kind == "huggingface":
        folder = local_folder(source)
        if folder is None:
            return _digest([source.path[0]]), None
        files = sorted(file for file in folder.rglob("*") if file.is_file())
    else:
        files = source_files(source)
    try:
        sizes = [file.stat().st_size for file in files]
    except OSError as error:
        raise UserError(f"{error.filename} can't be read: {error.strerror}") from None
    root = os.path.commonpath([file.absolute().parent for file in files]) if files else "."
    names = [os.path.relpath(file.absolute(), root) for file in files]
    total = None if source.kind in ("huggingface", "parquet") else sum(sizes)
    if any(file.suffix in _COMPRESSED for file in files):
        total = None  # bytes on disk say nothing about the bytes of text
    return _digest(json.dumps([name, size]) for name, size in zip(names, sizes, strict=True)), total


def _kind_of(argument: str) -> str:
    if not argument:
        raise UserError("the name of a source is empty")
    path = Path(argument).expanduser()
    if path.is_dir() and _is_saved_dataset(path):
        return "huggingface"
    if path.exists() or glob.has_magic(argument):
        kinds = {_kind_of_file(file) for file in _expand(argument)}
        if len(kinds) > 1:
            raise UserError(
                f"{argument} holds files of different kinds ({', '.join(sorted(kinds))}); "
                "name the ones to read, for example with a pattern"
            )
        return kinds.pop()
    # `data/missing` next to a directory `data` is a path mistyped rather than a dataset on the Hub.
    looks_like_a_file = _has_known_ending(path) or path.parts[0] in ("/", "..", "~")
    if _HUB_ID.fullmatch(argument) and not looks_like_a_file and not Path(path.parts[0]).exists():
        return "huggingface"
    raise UserError(f"{argument}: no such file or directory")


def _kind_of_file(file: Path) -> str:
    name = file.name.lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    if name.endswith(_JSONL):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "files"


def _has_known_ending(file: Path) -> bool:
    name = file.name.lower()
    return name.endswith((*_JSONL, ".parquet", *_TEXT, *_COMPRESSED))


def _expand(argument: str, kind: str | None = None) -> list[Path]:
    """Return the files that one argument stands for, sorted by name.

    Of a directory, only those of one ``kind``; by default data before text.
    """
    path = Path(argument).expanduser()
    if path.is_dir():
        files = [
            file
            for file in sorted(path.rglob("*"))
            if file.is_file()
            and _has_known_ending(file)
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if kind is None:  # a README.md beside the data isn't part of it
            files = [file for file in files if _kind_of_file(file) != "files"] or files
        else:
            files = [file for file in files if _kind_of_file(file) == kind]
        if not files:
            what = {"files": "text", "jsonl": "JSON lines", "parquet": "Parquet"}.get(kind or "")
            raise UserError(
                f"no {what or 'text, JSON lines or Parquet'} files in {argument}; "
                f"for other endings give a pattern such as '{argument.rstrip('/')}/**/*.c'"
            )
        return files
    if path.exists():
        return [path]
    if glob.has_magic(argument):
        matches = sorted(glob.glob(str(path), recursive=True))
        files = [Path(match) for match in matches if os.path.isfile(match)]
        if not files:
            raise UserError(f"no file matches {argument}")
        return files
    raise UserError(f"{argument}: no such file or directory")


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _stdlib_files() -> list[Path]:
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _STDLIB_LEFT_OUT)
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise UserError(f"this Python has no standard library source in {root}; name other files")
    return sorted(found)


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
