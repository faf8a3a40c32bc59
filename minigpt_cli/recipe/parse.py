"""TOML -> Recipe: the file, the command line's overrides over it, and the origin of each value."""

import dataclasses
import difflib
import importlib.util
import os
import re
import tomllib
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.reading import read_text
from minigpt_cli.recipe.schema import Origin, Recipe
from minigpt_cli.recipe.tables import leaves, to_tables
from minigpt_cli.recipe.validate import find_problems, out_of_range

FORMAT = "minigpt-resolved-recipe-1"  # the `format` key of a file that dump_recipe() wrote
# Files written before there was a `format` key have this in their first line.
OLD_FIRST_LINE = "the resolved recipe; where each value came from"
_MAX_BYTES = 1 << 20
# (section, two settings of which one is given): the command line's replaces the file's.
_ALTERNATIVES = (("train", "steps", "tokens"), ("data.tokenizer", "path", "train_vocab"))


def load_recipe(
    path: Path | str, overrides: list[str] | None = None, name: str | None = None
) -> Recipe:
    """Read a recipe's file, apply overrides and check the result.

    Args:
        path: the TOML file.
        overrides: ``section.key=value`` from the command line; they win over the file.
        name: the recipe's name; default: the file's name without its ending.

    Raises:
        UserError: the file can't be read; or a list of all problems in it.
    """
    path = Path(path)
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such recipe{_examples(path.name)}")
    text = read_text(path, limit=_MAX_BYTES).removeprefix("\ufeff")  # a byte order mark
    return parse_recipe(text, overrides or [], where=str(path), name=name or path.stem)


def _examples(wanted: str) -> str:
    """Say where the recipes are that come with minigpt, or how to get the one that is wanted."""
    found = importlib.util.find_spec("minigpt_cli.recipes")
    folders = [] if found is None else found.submodule_search_locations or []
    file = f"{wanted.removesuffix('.toml')}.toml"
    if any(os.path.isfile(os.path.join(folder, file)) for folder in folders):
        return f"; minigpt brings one: minigpt recipes {file.removesuffix('.toml')} > {file}"
    return "".join(f"; there are examples in {folder}" for folder in folders)


def parse_recipe(
    text: str, overrides: list[str], *, where: str = "recipe", name: str = "recipe"
) -> Recipe:
    """Parse a recipe's text; see ``load_recipe``.

    Args:
        where: the file's name, for messages.
    """
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers and nesting beyond Python's limits
        raise UserError(f"{where}: not valid TOML: {error}") from None
    problems: list[str] = []
    resolved = tables.pop("format", None)
    if resolved not in (None, FORMAT):
        problems.append(f"{where}: format {resolved!r:.80} is not {FORMAT!r}: remove this line")
    origin: dict[str, Origin] = dict.fromkeys(leaves(tables), "recipe")
    if resolved == FORMAT or OLD_FIRST_LINE in text.partition("\n")[0]:
        origin.update(_origins_in_comments(text))
    overridden: set[str] = set()
    for override in overrides:
        key, equals, raw = (part.strip() for part in override.partition("="))
        if _is_no_text(override):
            problems.append(f"--set {key}: is not UTF-8 text")
            continue
        if not equals or "." not in key:
            problems.append(f"--set {override:.80}: write it as --set section.key=value")
            continue
        _set_leaf(tables, key.split("."), _toml_value(raw))
        origin[key] = "command line"
        overridden.add(key)
    for section, *pair in _ALTERNATIVES:
        given = [f"{section}.{key}" in overridden for key in pair]
        if any(given) and not all(given):
            other = pair[given.index(False)]
            _remove_leaf(tables, [*section.split("."), other])
            origin.pop(f"{section}.{other}", None)

    if not tables.keys() & {"model", "lora"}:
        problems.append(f"{where}: the section [model] is missing")
    locate = _Locator(where, text, overridden)
    recipe = _from_table(Recipe, tables, "", problems, locate)
    if recipe is not None:
        problems += find_problems(recipe)
    if problems:
        if len(problems) == 1:
            (problem,) = problems
            raise UserError(
                problem if problem.startswith((where, "--set")) else f"{where}: {problem}"
            )
        raise UserError("\n  ".join([f"{where}: {len(problems)} problems", *problems]))
    assert recipe is not None
    data = dataclasses.replace(recipe.data, path=recipe.data.path or f"data/{name}")
    recipe = dataclasses.replace(recipe, data=data, name=name)
    origin = {leaf: origin.get(leaf, "default") for leaf in leaves(to_tables(recipe))}
    return dataclasses.replace(recipe, origin=origin)


def _origins_in_comments(text: str) -> dict[str, Origin]:
    """Read the origins that ``dump_recipe`` wrote behind the values."""
    found: dict[str, Origin] = {}
    section = ""
    for line in text.splitlines():
        if header := re.match(r"\[([\w.\-]+)\]", line):
            section = header[1]
        elif value := re.match(r"(\w+) = .*  # (default|recipe|command line|base)$", line):
            found[f"{section}.{value[1]}"] = typing.cast(Origin, value[2])
    return found


@dataclass(frozen=True)
class _Locator:
    """Finds the line of the file, or the ``--set``, that gave a setting."""

    where: str
    text: str
    overridden: set[str]

    def __call__(self, section: str, key: str) -> str:
        dotted = f"{section}.{key}" if section else key
        if dotted in self.overridden:
            return f"--set {dotted}"
        if inner := [each for each in self.overridden if each.startswith(f"{dotted}.")]:
            return f"--set {min(inner)}: [{dotted}]"
        current = ""
        for number, line in enumerate(self.text.splitlines(), 1):
            if header := re.match(r"\s*\[([\w.\- ]+)\]", line):
                current = header[1].replace(" ", "")
                if current == dotted:
                    return f"{self.where}:{number}: [{dotted}]"
            elif current == section and re.match(rf"\s*{re.escape(key)}\s*=", line):
                return f"{self.where}:{number}: [{section}] {key}"
        return f"{self.where}: [{section}] {key}" if section else f"{self.where}: [{key}]"


def _from_table(cls: type, table: Any, section: str, problems: list[str], locate: _Locator) -> Any:
    """Build the dataclass ``cls`` from a TOML table; None if a key or a type is wrong.

    A line for each problem, also for each number out of its range, is added to ``problems``.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("internal")}
    values: dict[str, Any] = {}
    is_whole = True
    for key, value in table.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            known = f"did you mean {near[0]}?" if near else f"known here: {', '.join(fields)}"
            problems.append(f"{locate(section, key)}: unknown; {known}")
            is_whole = False
            continue
        kind = _dataclass_in(hints[key])
        dotted = f"{section}.{key}" if section else key
        if kind is None:
            try:
                values[key] = _convert(hints[key], value)
            except TypeError as error:
                problems.append(f"{locate(section, key)}: expected {error}, got {value!r:.80}")
                is_whole = False
        elif not isinstance(value, dict):
            problems.append(f"{locate(section, key)}: expected a table, [{dotted}]")
            is_whole = False
        else:
            values[key] = _from_table(kind, value, dotted, problems, locate)
            is_whole = is_whole and values[key] is not None
    for key, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and key not in table:
            missing = f"[{section}] {key}" if section else f"the section [{key}]"
            problems.append(f"{locate.where}: {missing} is missing")
            is_whole = False
    given = types.SimpleNamespace(**dict.fromkeys(fields) | values)
    problems += [f"{locate(section, key)}: {why}" for key, why in out_of_range(cls, given)]
    return cls(**values) if is_whole else None


def _dataclass_in(hint: Any) -> type | None:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = (option for option in options if isinstance(option, type))
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def _convert(hint: Any, value: Any) -> Any:
    """Convert a TOML value to the type ``hint``.

    Raises:
        TypeError: with the expected type in words.
    """
    kind = get_origin(hint)
    if kind in (Union, types.UnionType):
        (hint,) = (option for option in get_args(hint) if option is not type(None))
        return _convert(hint, value)
    if kind is Literal:
        if any(type(value) is type(option) and value == option for option in get_args(hint)):
            return value
        options = [  # as TOML writes them
            str(each).lower() if isinstance(each, bool) else str(each) for each in get_args(hint)
        ]
        near = difflib.get_close_matches(str(value), options, n=1, cutoff=0.6)
        hint_at = f" (did you mean {near[0]}?)" if near else ""
        raise TypeError(f"one of {', '.join(options)}{hint_at}")
    if kind is tuple:
        inner = get_args(hint)
        if isinstance(value, str) and inner[-1] is ... and _is_text(inner[0]):
            value = [value]
        if not isinstance(value, list):
            raise TypeError("a list")
        if inner[-1] is ...:
            return tuple(_convert(inner[0], item) for item in value)
        if len(value) != len(inner):
            raise TypeError(f"a list of {len(inner)}")
        return tuple(_convert(each, item) for each, item in zip(inner, value, strict=True))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is hint and not (hint is int and abs(value) >= 1 << 63):
        return value
    if type(value) is int and hint is int:
        raise TypeError("an integer that fits into 64 bits")
    names = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
    raise TypeError(names[hint])


def _is_text(hint: Any) -> bool:
    return hint is str or get_origin(hint) is Literal


def _is_no_text(argument: str) -> bool:
    """Whether the shell passed bytes that are no UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return True
    return False


def _toml_value(raw: str) -> Any:
    try:
        return tomllib.loads(f"value = {raw}")["value"]
    except (ValueError, RecursionError):
        return raw  # a bare word: --set precision.dtype=bf16


def _remove_leaf(tables: Any, keys: list[str]) -> None:
    for key in keys[:-1]:
        tables = tables.get(key, {}) if isinstance(tables, dict) else {}
    if isinstance(tables, dict):
        tables.pop(keys[-1], None)


def _set_leaf(tables: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(tables.get(key), dict):
            tables[key] = {}
        tables = tables[key]
    tables[keys[-1]] = value
