"""Read files that someone else may have written: size, form and types are checked.

Every parsed file comes through here, so a broken or hostile one ends in one line with the exit code
of ``error``: ``UserError`` (2) for a user's file, ``Damaged`` (4) for a file that minigpt wrote.
"""

import dataclasses
import json
import os
import re
import stat
import types
import typing
from pathlib import Path
from typing import Any, Union, get_args, get_origin

from minigpt_cli.core.errors import UserError, first_line

MAX_BYTES = 1 << 28  # the largest tokenizer.json on the Hub has about 35 MB
_MAX_DEPTH = 100
_SURROGATE = re.compile(r"\\u[dD]")  # its escape; json.loads joins pairs


def read_bytes(file: Path, error: type[UserError] = UserError, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file. A pipe or a device would block, or never end.

    Args:
        file: A link is followed.
        error: The type of the errors.
        limit: The most bytes that it may hold.

    Raises:
        UserError: The file is missing, too large or no regular file, or can't be read.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{file}: is not a regular file")
            if found.st_size > limit:
                raise error(f"{file}: is larger than {limit:,} bytes")
            return stream.read()
    except FileNotFoundError:
        raise error(f"{file}: no such file") from None
    except IsADirectoryError:
        raise error(f"{file}: is not a regular file") from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        reason = getattr(problem, "strerror", None) or problem
        raise error(f"{file}: can't be read: {reason}") from None


def read_text(file: Path, error: type[UserError] = UserError, limit: int = MAX_BYTES) -> str:
    """Return the UTF-8 text of a regular file; see ``read_bytes``.

    Raises:
        UserError: Also if it is not UTF-8.
    """
    try:
        return read_bytes(file, error, limit).decode()
    except UnicodeDecodeError as problem:
        raise error(f"{file}: can't be read: byte {problem.start:,} is not UTF-8") from None


def read_json(file: Path, error: type[UserError] = UserError) -> dict[str, Any]:
    """Return the JSON object in a regular file; see ``read_bytes``.

    Raises:
        UserError: Also if it holds no JSON object.
    """
    return parse_json(read_bytes(file, error), str(file), error)


def parse_json(
    content: bytes | str, where: str, error: type[UserError] = UserError
) -> dict[str, Any]:
    """Return the JSON object in ``content``.

    Args:
        content: UTF-8 text.
        where: Its file's name, for messages.
        error: The type of the errors.

    Raises:
        UserError: It is no JSON object, is nested too deeply, or holds half a surrogate pair.
    """
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text)
        if _is_deep(value):
            raise RecursionError("nested too deeply")
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(f"{where}: can't be read: a string holds half a surrogate pair") from None
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: can't be read: {first_line(problem)}") from None
    if not isinstance(value, dict):
        raise error(f"{where}: is not a JSON object")
    return value


def build(hint: Any, value: Any, name: str = "") -> Any:
    """Build a value of the type ``hint`` from parsed JSON, with the types checked all the way down.

    Numbers must be from 0 to 2^63: no file of ours holds others.

    Args:
        hint: A dataclass, int, float, str, bool, dict, list, tuple, a union with None, or Any.
        value: Of ``json.loads``.
        name: Of the value, for messages.

    Returns:
        The value. Lists become tuples where the hint says so.

    Raises:
        ValueError: The value has another type; the message names it.
    """
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if hint is Any:
        return value
    if kind in (Union, types.UnionType):
        (one,) = (each for each in inner if each is not type(None))
        return None if value is None else build(one, value, name)
    if dataclasses.is_dataclass(hint):
        return _build_dataclass(hint, value, name)
    if kind is tuple and isinstance(value, list):
        hints = [inner[0]] * len(value) if inner[-1] is ... else list(inner)
        if len(hints) == len(value):
            pairs = zip(hints, value, strict=True)
            return tuple(build(each, item, f"{name}[{i}]") for i, (each, item) in enumerate(pairs))
    elif kind is list and isinstance(value, list):
        return [build(inner[0], item, f"{name}[{i}]") for i, item in enumerate(value)]
    elif kind is dict and isinstance(value, dict):
        each = inner[1] if inner else Any
        return {key: build(each, item, f"{name}.{key}") for key, item in value.items()}
    elif kind in (int, float):
        allowed = (int, float) if kind is float else (int,)
        if type(value) in allowed and 0 <= value < 1 << 63:  # False for nan
            return value
    elif type(value) is kind:
        return value
    raise ValueError(f"{name or 'the content'} is not of the right type: {_short(value)}")


def _build_dataclass(cls: Any, value: Any, name: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{name or 'the content'} is not of the right type: {_short(value)}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(value.keys() - fields.keys()):
        raise ValueError(f"{unknown[0]!r:.80} is unknown")
    for key, field in fields.items():
        missing = dataclasses.MISSING
        if key not in value and field.default is missing and field.default_factory is missing:
            raise ValueError(f"{key} is missing")
    prefix = f"{name}." if name else ""
    return cls(**{key: build(hints[key], item, prefix + key) for key, item in value.items()})


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than ``_MAX_DEPTH`` times."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
    return bool(level)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
