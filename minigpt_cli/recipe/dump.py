"""Recipe -> TOML, with each value's origin in a comment; the differences of two recipes."""

import dataclasses
from typing import Any

import tomli_w

from minigpt_cli.recipe.schema import Recipe

FORMAT = "minigpt-resolved-recipe-1"  # the `format` key of a file that dump_recipe() wrote
# Files written before there was a `format` key have this in their first line.
OLD_FIRST_LINE = "the resolved recipe; where each value came from"


def dump_recipe(recipe: Recipe) -> str:
    """Write the resolved recipe as TOML; ``load_recipe`` reads it back with the origins."""
    lines = [
        f"# {recipe.name}: all settings of this run. The comment behind each is its origin.",
        f'format = "{FORMAT}"',
    ]

    def add_section(table: dict[str, Any], name: str) -> None:
        values = {key: value for key, value in table.items() if not isinstance(value, dict)}
        if not name:
            values = {}  # a section that is not set
        if values:
            lines.append(f"\n[{name}]")
        for key, value in values.items():
            origin = recipe.origin.get(f"{name}.{key}", "default")
            if value is None:
                lines.append(f"# {key} is not set  # {origin}")
                continue
            if isinstance(value, list):  # on one line, unlike tomli_w's arrays
                items = (tomli_w.dumps({"x": item}).strip()[4:] for item in value)
                shown = f"{key} = [{', '.join(items)}]"
            else:
                shown = tomli_w.dumps({key: value}).strip()
            lines.append(f"{shown}  # {origin}")
        for key, value in table.items():
            if isinstance(value, dict):
                add_section(value, f"{name}.{key}" if name else key)

    add_section(to_tables(recipe), "")
    return "\n".join(lines) + "\n"


def to_tables(recipe: Recipe) -> dict[str, Any]:
    """Convert a recipe to nested dictionaries; a setting that is not set is None."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            fields = [f.name for f in dataclasses.fields(value) if not f.metadata.get("internal")]
            return {name: plain(getattr(value, name)) for name in fields}
        return list(value) if isinstance(value, tuple) else value

    tables: dict[str, Any] = plain(recipe)
    return tables


def leaves(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested tables to ``section.key`` -> value."""
    found: dict[str, Any] = {}
    for key, value in tables.items():
        if isinstance(value, dict):
            found.update(leaves(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def setting_names(recipe: Recipe) -> list[str]:
    """List the names of all settings, as ``--set`` takes them."""
    return list(leaves(to_tables(recipe)))


def changed_settings(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """List (name, old value, new value) of every setting that differs."""
    before, after = (leaves(to_tables(recipe)) for recipe in (old, new))
    return [
        (key, before.get(key), after.get(key))
        for key in dict.fromkeys([*before, *after])
        if before.get(key) != after.get(key)
    ]
