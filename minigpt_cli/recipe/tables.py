"""TOML's tables to dataclasses, driven by the dataclasses' own types."""

import dataclasses
import difflib
import re
import tomllib
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from minigpt_cli.recipe.schema import Origin


@dataclass(frozen=True)
class Locator:
    """Says where in the file, or that on the command line, a setting was given."""

    where: str
    text: str
    origin: dict[str, Origin]

    def __call__(self, section: str, key: str) -> str:
        dotted = f"{section}.{key}" if section else key
        if self.origin.get(dotted) == "command line":
            return f"--set {dotted}"
        current = ""
        for number, line in enumerate(self.text.splitlines(), 1):
            if header := re.match(r"\s*\[([\w.\- ]+)\]", line):
                current = header[1].replace(" ", "")
                if current == dotted:
                    return f"{self.where}:{number}: [{dotted}]"
            elif current == section and re.match(rf"\s*{re.escape(key)}\s*=", line):
                return f"{self.where}:{number}: [{section}] {key}"
        return f"{self.where}: [{section}] {key}" if section else f"{self.where}: [{key}]"


def from_table(cls: type, table: Any, section: str, problems: list[str], locate: Locator) -> Any:
    """An instance of the dataclass ``cls`` from a TOML table, or None with ``problems`` added."""
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("internal")}
    values: dict[str, Any] = {}
    before = len(problems)
    for key, value in table.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            known = f"did you mean {near[0]}?" if near else f"known here: {', '.join(fields)}"
            problems.append(f"{locate(section, key)}: unknown; {known}")
            continue
        kind = _dataclass_in(hints[key])
        if kind is None:
            try:
                values[key] = _convert(hints[key], value)
            except TypeError as error:
                problems.append(f"{locate(section, key)}: {error}, not {value!r}")
        elif not isinstance(value, dict):
            problems.append(f"{locate(section, key)}: must be a table, [{key}]")
        else:
            inner = f"{section}.{key}" if section else key
            values[key] = from_table(kind, value, inner, problems, locate)
    for key, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and key not in table:
            missing = f"[{section}] {key}" if section else f"the section [{key}]"
            problems.append(f"{locate.where}: {missing} is missing")
    return cls(**values) if len(problems) == before else None


def _dataclass_in(hint: Any) -> type | None:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = (option for option in options if isinstance(option, type))
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def _convert(hint: Any, value: Any) -> Any:
    """``value`` as the type ``hint``; TypeError says what was expected."""
    kind = get_origin(hint)
    if kind in (Union, types.UnionType):
        (hint,) = (option for option in get_args(hint) if option is not type(None))
        return _convert(hint, value)
    if kind is Literal:
        if value in get_args(hint):
            return value
        options = [str(option) for option in get_args(hint)]
        near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.6)
        raise TypeError(
            f"must be one of {', '.join(options)}" + (f" (did you mean {near[0]}?)" if near else "")
        )
    if kind is tuple:
        inner = get_args(hint)
        if isinstance(value, str) and inner == (str, ...):
            return (value,)
        if not isinstance(value, list):
            raise TypeError("must be a list")
        if inner[-1] is ...:
            return tuple(_convert(inner[0], item) for item in value)
        if len(value) != len(inner):
            raise TypeError(f"must be a list of {len(inner)}")
        return tuple(_convert(each, item) for each, item in zip(inner, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint:
        return value
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    raise TypeError(f"must be {names[hint]}")


def toml_value(raw: str) -> Any:
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):
        return raw  # a bare word: --set precision.dtype=bf16


def assign(tables: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(tables.get(key), dict):
            tables[key] = {}
        tables = tables[key]
    tables[keys[-1]] = value


def leaves(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            found.update(leaves(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found
