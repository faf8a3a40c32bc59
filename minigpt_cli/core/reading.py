"""Read files that someone else may have written: size, form and types are checked.

Every parsed file comes through here, so a broken or hostile one ends in one line with the exit code
of ``error``: ``UserError`` (2) for a user's file, ``Damaged`` (4) for a file that minigpt wrote.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import stat
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Union, get_args, get_origin

from minigpt_cli.core.errors import UserError, first_line

MAX_BYTES = 64 << 20
MAX_TOKENIZER_BYTES = 256 << 20  # the largest tokenizer.json on the Hub has about 35 MB
_MAX_JSON_BYTES = 16 << 20  # parsed JSON may take 30 times as much memory
_MAX_DEPTH = 100
_type_hints = functools.cache(typing.get_type_hints)  # a manifest has thousands of entries
_SURROGATE = re.compile(r"\\u[dD]")  # its escape; json.loads joins pairs


@contextlib.contextmanager
def open_regular(
    file: Path, error: type[UserError] = UserError, limit: int = MAX_BYTES
) -> Iterator[BinaryIO]:
    """Open a regular file to read. A pipe or a device would block, or never end.

    Args:
        file: A link is followed.
        error: The type of the errors.
        limit: The most bytes that it may hold.

    Yields:
        The open file. Errors of the system in the ``with`` block become ``error`` too.

    Raises:
        UserError: The file is missing, too large or no regular file, or can't be read.
    """
    try:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except ValueError as problem:  # a NUL in the name
            raise error(f"{file}: can't be read: {problem}") from None
        with open(descriptor, "rb") as stream:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise error(f"{file}: is not a regular file")
            if found.st_size > limit:
                raise error(f"{file}: is larger than {limit:,} bytes")
            yield stream
    except FileNotFoundError:
        raise error(f"{file}: no such file") from None
    except IsADirectoryError:
        raise error(f"{file}: is not a regular file") from None
    except OSError as problem:
        raise error(f"{file}: can't be read: {problem.strerror or problem}") from None


def read_bytes(file: Path, error: type[UserError] = UserError, limit: int = MAX_BYTES) -> bytes:
    """Return the content of a regular file; see ``open_regular``.

    Raises:
        UserError: The file is missing, too large or no regular file, or can't be read.
    """
    with open_regular(file, error, limit) as stream:
        return stream.read()


def read_end(file: Path, size: int, error: type[UserError] = UserError) -> bytes:
    """Return the last ``size`` bytes of a regular file, however large; all of a smaller one.

    Raises:
        UserError: The file is missing or no regular file, or can't be read.
    """
    with open_regular(file, error, limit=1 << 63) as stream:
        stream.seek(max(0, os.fstat(stream.fileno()).st_size - size))
        return stream.read(size)


def read_text(file: Path, error: type[UserError] = UserError, limit: int = MAX_BYTES) -> str:
    """Return the UTF-8 text of a regular file; see ``read_bytes``.

    Raises:
        UserError: Also if it is not UTF-8.
    """
    try:
        return read_bytes(file, error, limit).decode()
    except UnicodeDecodeError as problem:
        raise error(f"{file}: can't be read: byte {problem.start:,} is not UTF-8") from None


def read_json(
    file: Path, error: type[UserError] = UserError, limit: int = _MAX_JSON_BYTES
) -> dict[str, Any]:
    """Return the JSON object in a regular file; see ``read_bytes``.

    Raises:
        UserError: Also if it holds no JSON object.
    """
    return parse_json(read_bytes(file, error, limit), str(file), error)


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
        value = _loads(content)
        text = content.decode() if isinstance(content, bytes) else content
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(f"{where}: can't be read: a string holds half a surrogate pair") from None
    except ValueError as problem:
        raise error(f"{where}: can't be read: {first_line(problem)}") from None
    if not isinstance(value, dict):
        raise error(f"{where}: is not a JSON object")
    return value


def parse_form(content: bytes, form: Any) -> Any:
    """Return the value of JSON that another process sent; it may be broken, or a stranger.

    Args:
        content: UTF-8 text. A name of a file in it may hold half a surrogate pair.
        form: See ``build``.

    Raises:
        ValueError: It is no JSON, or has another form.
    """
    return build(form, _loads(content))


def _loads(content: bytes | str) -> Any:
    text = content.decode().removeprefix("\ufeff") if isinstance(content, bytes) else content
    try:
        value = json.loads(text)
        if _is_deep(value):
            raise RecursionError("nested too deeply")
    except RecursionError as problem:
        raise ValueError(first_line(problem)) from None
    return value


def build(form: Any, value: Any, name: str = "") -> Any:
    """Build a value of a known form from parsed JSON, with the types checked all the way down.

    Numbers must be from 0 to 2^63: none of ours are others.

    Args:
        form: A dataclass, TypedDict, int, float, str, bool, None, dict, list, tuple, Any, or a
            union of these.
        value: Of ``json.loads``.
        name: Of the value, for messages.

    Returns:
        The value. Lists become tuples where the form says so.

    Raises:
        ValueError: The value has another form; the message names the part.
    """
    kind, inner = get_origin(form) or form, get_args(form)
    if form is Any:
        return value
    if kind in (Union, types.UnionType):
        return _build_one_of(inner, value, name)
    if dataclasses.is_dataclass(form):
        return kind(**_build_fields(form, value, name))
    if typing.is_typeddict(form):
        return _build_fields(form, value, name)
    if kind is tuple and isinstance(value, list):
        forms = [inner[0]] * len(value) if inner[-1] is ... else list(inner)
        if len(forms) == len(value):
            pairs = zip(forms, value, strict=True)
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
    elif type(value) is (types.NoneType if kind is None else kind):
        return value
    raise _wrong(value, name)


def _build_one_of(forms: tuple[Any, ...], value: Any, name: str) -> Any:
    *others, last = sorted(forms, key=lambda form: form is not types.NoneType)
    for form in others:
        try:
            return build(form, value, name)
        except ValueError:
            continue
    return build(last, value, name)  # for its message


def _build_fields(cls: Any, value: Any, name: str) -> dict[str, Any]:
    """Build the fields of a dataclass or a TypedDict."""
    if not isinstance(value, dict):
        raise _wrong(value, name)
    hints = _type_hints(cls)
    if unknown := sorted(value.keys() - hints.keys()):
        raise ValueError(f"{unknown[0]!r:.80} is unknown")
    missing, needed = dataclasses.MISSING, set(hints)
    if dataclasses.is_dataclass(cls):
        fields = dataclasses.fields(cls)
        needed = {f.name for f in fields if f.default is missing and f.default_factory is missing}
    if left_out := sorted(needed - value.keys()):
        raise ValueError(f"{left_out[0]} is missing")
    prefix = f"{name}." if name else ""
    return {key: build(hints[key], item, prefix + key) for key, item in value.items()}


def _wrong(value: Any, name: str) -> ValueError:
    return ValueError(f"{name or 'the content'} is not of the right type: {value!r:.60}")


def _is_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than ``_MAX_DEPTH`` times."""

    def inside(each: Any) -> Iterator[Any]:
        return iter(each.values() if isinstance(each, dict) else each)

    path = [inside(value)] if isinstance(value, dict | list) else []
    while path:
        for inner in path[-1]:
            if isinstance(inner, dict | list):
                path.append(inside(inner))
                break
        else:
            path.pop()
        if len(path) > _MAX_DEPTH:
            return True
    return False
