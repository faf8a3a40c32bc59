"""Put the table of all settings into docs/recipe.md.

    python scripts/recipe_table.py

It is made from minigpt_cli/recipe/schema.py; a test compares the page with it.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from minigpt_cli.recipe.schema import Recipe

PAGE = Path(__file__).parent.parent / "docs/recipe.md"
MARKS = "<!-- settings -->\n", "<!-- end of settings -->"
NAMES = {int: "integer", float: "number", str: "string", bool: "`true` or `false`"}


def with_table(page: str) -> str:
    """Return the page with today's table between the marks."""
    before, rest = page.split(MARKS[0])
    _, after = rest.split(MARKS[1])
    return before + MARKS[0] + table() + MARKS[1] + after


def table() -> str:
    rows = [("setting", "value", "default", "meaning"), ("---",) * 4, *_rows(Recipe, "")]
    return "".join("| " + " | ".join(row).replace("|  |", "| |") + " |\n" for row in rows)


def _rows(section: type, name: str) -> Iterator[tuple[str, str, str, str]]:
    """Return a row for each setting of a section; then those of the sections in it."""
    hints = typing.get_type_hints(section)
    inner = []
    for field in dataclasses.fields(section):
        if field.metadata.get("internal"):
            continue
        dotted = f"{name}.{field.name}" if name else field.name
        if kinds := [
            each for each in _options(hints[field.name]) if dataclasses.is_dataclass(each)
        ]:
            inner.append((kinds[0], dotted))
            continue
        allowed = field.metadata["range"]
        values = _values(hints[field.name]) + (f" {allowed}" if allowed else "")
        yield f"`{dotted}`", values, _default(field), field.metadata["help"]
    for kind, dotted in inner:
        yield from _rows(kind, dotted)


def _options(hint: Any) -> list[Any]:
    several = get_origin(hint) in (Union, types.UnionType)
    return [each for each in get_args(hint) if each is not type(None)] if several else [hint]


def _values(hint: Any) -> str:
    """Return the type of a setting in words."""
    (hint,) = _options(hint)
    if get_origin(hint) is Literal:
        *most, last = (f"`{json.dumps(value)}`" for value in get_args(hint))
        return f"{', '.join(most)} or {last}"
    if get_origin(hint) is tuple:
        inner = get_args(hint)
        if get_origin(inner[0]) is Literal:
            return f"list of {_values(inner[0])}"
        return f"{'list of' if inner[-1] is ... else len(inner)} {NAMES[inner[0]]}s"
    return NAMES[hint]


def _default(field: "dataclasses.Field[Any]") -> str:
    if field.default is dataclasses.MISSING:
        return "must be given"
    if field.default is None:
        unset: str = field.metadata["unset"]
        return unset
    return f"`{json.dumps(field.default)}`"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
