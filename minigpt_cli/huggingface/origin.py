"""minigpt.json: in an export of a model that minigpt trained, where it comes from."""

import json
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.reading import read_json

ORIGIN = "minigpt.json"
_FORMAT = 1


def origin_text(origin: dict[str, str]) -> str:
    """Return the content of minigpt.json.

    Args:
        origin: "checkpoint": its name; "manifest_sha256": the hash of its manifest;
            "base_sha256": see ``weights_fingerprint``, of the base of an adapter. All optional.
    """
    return json.dumps({"format": _FORMAT, **origin}, indent=2) + "\n"


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
            f"{file}: format {found!r}, but this version of minigpt reads {_FORMAT}: upgrade "
            "minigpt, or remove this file"
        )
    return origin
