"""A recipe as nested tables, and the differences of two recipes."""

import dataclasses
from typing import Any

from minigpt_cli.recipe.schema import Recipe


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
