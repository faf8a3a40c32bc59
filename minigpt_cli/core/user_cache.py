"""Small JSON files in the user's cache directory; they save work, and nothing depends on them."""

import json
import os
import stat
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import write_atomically
from minigpt_cli.core.reading import open_regular, parse_json

_MAX_BYTES = 16 << 20


def read_cached(name: str) -> dict[str, Any] | None:
    """Return the JSON object in the cache's file ``name``.

    Returns:
        None if there is none, if it can't be read, or if another user may have written it.
    """
    folder = _folder()
    try:
        if folder is None or not _is_private(folder.stat()):
            return None
        with open_regular(folder / name, limit=_MAX_BYTES) as stream:
            if not _is_private(os.fstat(stream.fileno())):
                return None
            return parse_json(stream.read(), name)
    except (OSError, UserError):
        return None


def write_cached(name: str, content: dict[str, Any]) -> None:
    """Replace the cache's file ``name``. If that isn't possible, nothing happens."""
    folder = _folder()
    try:
        if folder is not None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_private(folder.stat()):
                write_atomically(folder / name, json.dumps(content).encode(), mode=0o600)
    except OSError:
        return


def _folder() -> Path | None:
    """Return ``$XDG_CACHE_HOME/minigpt`` or ``~/.cache/minigpt``; None if there is no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # as the specification says
        base = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base, "minigpt") if os.path.isabs(base) and "\0" not in base else None


def _is_private(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
