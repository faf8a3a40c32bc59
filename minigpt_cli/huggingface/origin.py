"""minigpt.json: where an exported model comes from, and the checksums of the export's files."""

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.core.files import os_reason, sha256_of
from minigpt_cli.core.reading import build, read_json

ORIGIN = "minigpt.json"
CARD = "README.md"  # for people to edit, so it has no checksum
EXPORTED = re.compile(  # names of the files of an export
    r"README\.md|(model(-\d+-of-\d+)?|adapter_model)\.safetensors|chat_template\.jinja"
    r"|(config|generation_config|adapter_config|minigpt|model\.safetensors\.index|tokenizer"
    r"|tokenizer_config|special_tokens_map)\.json"
)
_FORMAT = 1


@dataclass(frozen=True)
class _Recorded:
    """A file as it was written."""

    bytes: int
    sha256: str


def origin_text(origin: dict[str, Any]) -> str:
    """Return the content of minigpt.json.

    Args:
        origin: "checkpoint": its name; "manifest_sha256": the hash of its manifest;
            "base_sha256": see ``weights_fingerprint``, of the base of an adapter; "trained": false
            if minigpt only converted the model; "files": see ``write_origin``. All optional.
    """
    return json.dumps({"format": _FORMAT, **origin}, indent=2) + "\n"


def write_origin(folder: Path, origin: dict[str, str] | None) -> None:
    """Write minigpt.json into a complete export, with the size and sha256 of every other file.

    Args:
        folder: The export.
        origin: See ``origin_text``; None if minigpt didn't train the model.
    """
    names = sorted(name for name in os.listdir(folder) if name not in (CARD, ORIGIN))
    files = {
        name: asdict(_Recorded((folder / name).stat().st_size, sha256_of(folder / name)))
        for name in names
    }
    content = {**({"trained": False} if origin is None else origin), "files": files}
    (folder / ORIGIN).write_text(origin_text(content), encoding="utf-8")


def read_origin(directory: Path) -> dict[str, Any] | None:
    """Read the minigpt.json of an export; None if there is none, so minigpt didn't train it.

    Raises:
        UserError: It can't be read, or a newer version of minigpt wrote it.
    """
    file = directory / ORIGIN
    if not file.is_file():
        return None
    origin = read_json(file)
    found = origin.pop("format", _FORMAT)  # the first versions wrote no format
    if found != _FORMAT:
        raise UserError(
            f"{file}: format {found!r:.80}, but this version of minigpt reads {_FORMAT}: upgrade "
            "minigpt, or remove this file"
        )
    return origin


def is_trained_here(directory: Path) -> bool:
    """Whether minigpt trained the model in a directory: it has a minigpt.json, valid or not."""
    if not (directory / ORIGIN).is_file():
        return False
    with contextlib.suppress(UserError):
        return (read_origin(directory) or {}).get("trained") is not False
    return True


def verify_export(directory: Path) -> dict[str, str]:
    """Compare an export's files with the checksums in its minigpt.json.

    Returns:
        Damaged file -> what is wrong with it; {} for a valid export.

    Raises:
        UserError: It has no checksums: an earlier version exported it, or another tool made it.
        Damaged: minigpt.json is damaged.
    """
    origin = read_origin(directory)
    if origin is None or "files" not in origin:
        raise UserError(
            f"{directory}: is a Hugging Face directory without checksums; "
            f"minigpt export writes them ({ORIGIN})"
        )
    try:
        recorded: dict[str, _Recorded] = build(dict[str, _Recorded], origin["files"], "files")
    except ValueError as error:
        raise Damaged(f"{directory / ORIGIN}: {error}") from None
    problems = {name: _problem(directory, name, entry) for name, entry in recorded.items()}
    for name in sorted(os.listdir(directory)):
        if EXPORTED.fullmatch(name) and name not in (*recorded, CARD, ORIGIN):
            problems[name] = f"is not in {ORIGIN}"
    return {name: problem for name, problem in problems.items() if problem}


def _problem(directory: Path, name: str, entry: _Recorded) -> str:
    file = directory / name
    if Path(name).name != name:
        return "is outside the directory"
    try:
        if not os.path.isfile(file):
            return "is missing"
        if (size := file.stat().st_size) != entry.bytes:
            return f"{size:,} bytes, {entry.bytes:,} were written"
        return "" if sha256_of(file) == entry.sha256 else "its content doesn't match its sha256"
    except OSError as error:
        return f"can't be read: {os_reason(error)}"
