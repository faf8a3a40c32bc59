"""A recipe's text to settings and back, with the origin of each."""

import dataclasses
import re
import tomllib
import typing
from pathlib import Path
from typing import Any

import tomli_w

from minigpt_cli.core.errors import UserError
from minigpt_cli.recipe.schema import Origin, Recipe
from minigpt_cli.recipe.tables import Locator, assign, from_table, leaves, toml_value
from minigpt_cli.recipe.validate import contradictions


def load_recipe(
    path: Path | str, overrides: list[str] | None = None, name: str | None = None
) -> Recipe:
    """Read a recipe, put the command line's ``section.key=value`` overrides over it, check it.

    Args:
        name: what to call it; by default the file's name without its ending.

    Raises:
        UserError: the file can't be read, or a list of everything that is wrong in it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8").removeprefix("\ufeff")  # a byte order mark
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; recipes/ holds examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: the recipe can't be read: {error}") from None
    return parse_recipe(text, overrides or [], where=str(path), name=name or path.stem)


def parse_recipe(
    text: str, overrides: list[str], *, where: str = "recipe", name: str = "recipe"
) -> Recipe:
    """The recipe in ``text``; see ``load``."""
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers and nesting beyond Python's limits
        raise UserError(f"{where}: not valid TOML: {error}") from None

    problems: list[str] = []
    origin: dict[str, Origin] = dict.fromkeys(leaves(tables), "recipe")
    origin.update(_origins_in_comments(text))
    for override in overrides:
        key, equals, raw = override.partition("=")
        key = key.strip()
        if not equals or "." not in key:
            problems.append(f"--set {override}: write it as --set section.key=value")
            continue
        assign(tables, key.split("."), toml_value(raw.strip()))
        origin[key] = "command line"

    locate = Locator(where, text, origin)
    if not tables.keys() & {"model", "lora"}:
        problems.append(f"{where}: the section [model] is missing")
    recipe = from_table(Recipe, tables, "", problems, locate)
    if recipe is not None:
        problems += contradictions(recipe)
    if problems:
        if len(problems) == 1:
            (problem,) = problems
            raise UserError(problem if problem.startswith(where) else f"{where}: {problem}")
        raise UserError("\n  ".join([f"{where}: {len(problems)} problems", *problems]))
    assert recipe is not None
    data = dataclasses.replace(recipe.data, path=recipe.data.path or f"data/{name}")
    recipe = dataclasses.replace(recipe, data=data)
    all_leaves = leaves(to_tables(recipe))
    origin = {leaf: origin.get(leaf, "default") for leaf in all_leaves}
    return dataclasses.replace(recipe, name=name, origin=origin)


def to_tables(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested plain dictionaries; settings that are not set are None."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = [f.name for f in dataclasses.fields(value) if not f.metadata.get("internal")]
            return {name: plain(getattr(value, name)) for name in fields}
        return list(value) if isinstance(value, tuple) else value

    tables: dict[str, Any] = plain(recipe)
    return tables


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as TOML, each value's origin in a comment."""
    lines = [f"# {recipe.name}: the resolved recipe; where each value came from stands behind it"]

    def section(table: dict[str, Any], prefix: str) -> None:
        values = {key: value for key, value in table.items() if not isinstance(value, dict)}
        if not prefix:
            values = {}  # a whole section that is not set
        if values:
            lines.append(f"\n[{prefix}]")
        for key, value in values.items():
            origin = recipe.origin.get(f"{prefix}.{key}", "default")
            if value is None:
                lines.append(f"# {key} is not set  # {origin}")
            else:
                if isinstance(value, list):  # on one line, unlike tomli_w's arrays
                    items = (tomli_w.dumps({"x": item}).strip()[4:] for item in value)
                    shown = f"{key} = [{', '.join(items)}]"
                else:
                    shown = tomli_w.dumps({key: value}).strip()
                lines.append(f"{shown}  # {origin}")
        for key, value in table.items():
            if isinstance(value, dict):
                section(value, f"{prefix}.{key}" if prefix else key)

    section(to_tables(recipe), "")
    return "\n".join(lines) + "\n"


def setting_names(recipe: Recipe) -> list[str]:
    """The names of all settings, as ``--set`` takes them."""
    return list(leaves(to_tables(recipe)))


def changed_settings(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of every setting that differs."""
    before, after = (leaves(to_tables(recipe)) for recipe in (old, new))
    return [
        (key, before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]


def _origins_in_comments(text: str) -> dict[str, Origin]:
    """The origins that ``dump`` wrote; nothing in a recipe that a person wrote."""
    found: dict[str, Origin] = {}
    if "the resolved recipe; where each value came from" not in text.partition("\n")[0]:
        return found
    section = ""
    for line in text.splitlines():
        if header := re.match(r"\[([\w.\-]+)\]", line):
            section = header[1]
        elif value := re.match(r"(\w+) = .*  # (default|recipe|command line|base)$", line):
            found[f"{section}.{value[1]}"] = typing.cast(Origin, value[2])
    return found
