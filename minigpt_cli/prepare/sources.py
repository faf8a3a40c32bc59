"""Find the files that a user's words for a source mean; ``documents.py`` reads them."""

import contextlib
import glob
import hashlib
import json
import os
import re
import stat
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt_cli.core.console import counted, warn
from minigpt_cli.core.errors import UserError

KINDS = ("files", "jsonl", "parquet", "huggingface", "python-stdlib")

COMPRESSED = (".gz", ".xz", ".zst")
_JSONL = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".text", ".md", ".rst", ".py", ".log", ".tex", ".html", ".xml")
_FORMATS = {"files": "text", "jsonl": "JSON lines", "parquet": "Parquet"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_STDLIB_SKIPPED = frozenset(
    ("test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__")
)


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    Attributes:
        kind: One of ``KINDS``.
        path: Files, directories or glob patterns (``**`` crosses directories) for ``files``,
            ``jsonl`` and ``parquet``; one local directory or Hub id for ``huggingface``; nothing
            for ``python-stdlib``.
        field: The field that holds the text, in JSON lines, Parquet and Hugging Face datasets.
        split: The split of a Hugging Face dataset.
        config: The configuration of a Hugging Face dataset.

    Raises:
        UserError: The kind is unknown, or the path doesn't suit it.
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
                raise UserError(f"python-stdlib takes no path: leave out {', '.join(self.path)}")
        elif not self.path:
            raise UserError(f"a source of kind {self.kind} needs a path: name files or a dataset")
        elif not all(self.path):
            raise UserError("a source's name is empty: name a file, a directory or a dataset")
        elif self.kind == "huggingface" and len(self.path) != 1:
            raise UserError(
                "give one Hugging Face dataset (a directory or a Hub id) at a time, "
                f"not {len(self.path)}: {', '.join(self.path)}"
            )

    def describe(self) -> dict[str, Any]:
        """Describe the source in plain JSON values, for ``dataset.json``."""
        described: dict[str, Any] = {"kind": self.kind, "path": list(self.path)}
        if self.kind in ("jsonl", "parquet", "huggingface"):
            described["field"] = self.field
        if self.kind == "huggingface":
            described |= {"split": self.split, "config": self.config}
        return described


def detect_source(
    arguments: list[str], field: str = "text", split: str = "train", config: str | None = None
) -> Source:
    """Find out what the arguments of ``minigpt tokenize SOURCE...`` mean.

    The ending of a file decides how it is read: .jsonl, .ndjson and .json are JSON lines, .parquet
    is Parquet, anything else is plain text with one document per file. Files that end with one of
    ``COMPRESSED`` are decompressed. A name like ``org/name`` that isn't a file or a directory is a
    Hub id.

    Args:
        arguments: Files, directories, glob patterns, one Hugging Face dataset, or "python-stdlib".
        field: The field that holds the text.
        split: The split of a Hugging Face dataset.
        config: The configuration of a Hugging Face dataset.

    Raises:
        UserError: A path doesn't exist, a pattern matches nothing, or the kinds are mixed.
    """
    if not arguments:
        raise UserError("no source given: name files, a directory, a Hub dataset, or python-stdlib")
    if "python-stdlib" in arguments and len(arguments) > 1:
        raise UserError("python-stdlib can't be mixed with other sources: make a dataset of each")
    kinds: dict[str, str] = {}  # kind -> the first argument of that kind
    for argument in arguments:
        kind = argument if argument == "python-stdlib" else _kind_of(argument)
        kinds.setdefault(kind, argument)
    if len(kinds) > 1:
        mixed = ", ".join(f"{argument} ({kind})" for kind, argument in kinds.items())
        raise UserError(
            f"sources of different kinds can't be mixed: {mixed}; make a dataset of each"
        )
    kind = next(iter(kinds))
    if kind != "huggingface" and (split != "train" or config is not None):
        raise UserError(f"--split and --config are for Hugging Face datasets, not for {kind}")
    if kind == "python-stdlib":
        return Source(kind)
    return Source(kind, tuple(arguments), field, split, config)


def source_files(source: Source) -> list[Path]:
    """List the files of a source of kind files, jsonl, parquet or python-stdlib.

    Returns:
        The files in the order of reading: the paths keep their order, the files of a pattern or a
        directory are sorted by name, and a file that is named twice is listed once.

    Raises:
        UserError: A path doesn't exist, or gives no file.
    """
    if source.kind == "python-stdlib":
        return _stdlib_files()
    assert source.kind in _FORMATS, source.kind
    found: dict[Path, None] = {}
    for argument in source.path:
        for file in _expand(argument, source.kind):
            found.setdefault(file)
    return list(found)


def local_folder(source: Source) -> Path | None:
    """Return the directory of a ``huggingface`` source, None if it is a Hub id."""
    folder = Path(source.path[0]).expanduser()
    return folder if folder.is_dir() else None


def listing(source: Source) -> tuple[str, int | None]:
    """Fingerprint the names and sizes of a source's files.

    It tells cheaply whether a source is the one that was read before. Names are relative to the
    common directory, and modification times don't count: a corpus that was moved or checked out
    anew keeps its fingerprint. The fingerprint of a Hub id covers the id alone. The text itself has
    a fingerprint of its own in ``dataset.json``.

    Returns:
        The sha256 (hex), and the bytes of all files, in JSON lines with everything beside the text.
        The bytes are None if the files are compressed, or tables.

    Raises:
        UserError: A file doesn't exist or can't be read.
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
    if any(file.suffix in COMPRESSED for file in files):
        total = None  # the size on disk is not the size of the text
    return _digest(json.dumps([name, size]) for name, size in zip(names, sizes, strict=True)), total


def _kind_of(argument: str) -> str:
    if not argument:
        raise UserError("a source's name is empty: name a file, a directory or a dataset")
    if argument == "-":
        raise UserError(
            "standard input (-) can't be a source, because text is read more than once: "
            "write it to a file first"
        )
    path = Path(argument).expanduser()
    if path.is_dir() and _is_saved_dataset(path):
        return "huggingface"
    if path.exists() or glob.has_magic(argument):
        files = _expand(argument)
        kinds = {_kind_of_file(file) for file in files}
        if len(kinds) > 1:
            raise UserError(
                f"{argument} holds files of different kinds ({', '.join(sorted(kinds))}): "
                "name files of one kind, or give a pattern that matches only these"
            )
        kind = kinds.pop()
        if path.is_dir() and kind != "files":
            _report_left_out(argument, kind, len(files))
        return kind
    # If `data` is a directory, `data/missing` is a mistyped path and not a dataset on the Hub.
    looks_like_a_file = _has_known_ending(path) or path.parts[0] in ("/", "..", "~")
    if _HUB_ID.fullmatch(argument) and not looks_like_a_file and not Path(path.parts[0]).exists():
        return "huggingface"
    raise UserError(f"{argument}: no such file or directory")


def _kind_of_file(file: Path) -> str:
    name = file.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    if name.endswith(_JSONL):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "files"


def _has_known_ending(file: Path) -> bool:
    name = file.name.lower()
    return name.endswith((*_JSONL, ".parquet", *_TEXT, *COMPRESSED))


def _expand(argument: str, kind: str | None = None) -> list[Path]:
    """List the files that one argument stands for, sorted by name.

    From a directory take the files of one kind; by default all that hold data, or else all texts.
    """
    path = Path(argument).expanduser()
    if path.is_dir():
        files = _files_in(path)
        if kind is None:  # a README.md beside data is no data
            files = [file for file in files if _kind_of_file(file) != "files"] or files
        else:
            files = [file for file in files if _kind_of_file(file) == kind]
        if not files:
            what = _FORMATS.get(kind or "")
            raise UserError(
                f"no {what or 'text, JSON lines or Parquet'} files in {argument}; "
                f"to read other files give a pattern such as '{argument.rstrip('/')}/**/*.c'"
            )
        return files
    if path.exists():
        check_regular(path)
        return [path]
    if glob.has_magic(argument):
        matches = sorted(glob.glob(str(path), recursive=True))
        files = [Path(match) for match in matches if os.path.isfile(match)]
        if not files:
            raise UserError(f"no file matches {argument}: check the pattern")
        return files
    raise UserError(f"{argument}: no such file or directory")


def check_regular(file: Path) -> None:
    """Check that a path isn't a pipe or a device. A path that doesn't exist is left to others.

    Raises:
        UserError: It is one.
    """
    with contextlib.suppress(OSError):
        mode = file.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise UserError(
                f"{file} is a pipe or a device, and text is read more than once: "
                "write it to a file first"
            )


def _files_in(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and _has_known_ending(file)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def _report_left_out(argument: str, kind: str, count: int) -> None:
    """Say which files of a directory are read, if others are not."""
    texts = [file for file in _files_in(Path(argument).expanduser()) if _is_text(file)]
    if texts:
        warn(
            f"{argument}: reading {counted(count, 'file')} of {_FORMATS[kind]} and leaving out "
            f"{counted(len(texts), 'file')} of text ({texts[0].name}); to read text give a pattern "
            f"such as '{argument.rstrip('/')}/**/*{texts[0].suffix}'"
        )


def _is_text(file: Path) -> bool:
    return _kind_of_file(file) == "files"


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _stdlib_files() -> list[Path]:
    root = sysconfig.get_paths()["stdlib"]
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - _STDLIB_SKIPPED)
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise UserError(f"this Python has no standard library source in {root}; name other files")
    return sorted(found)


def _digest(lines: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
