"""Recipe -> TOML, with each value's origin in a comment."""

from typing import Any

import tomli_w

from minigpt_cli.recipe.parse import FORMAT, parse_recipe
from minigpt_cli.recipe.schema import Recipe
from minigpt_cli.recipe.tables import to_tables


def dump_recipe(recipe: Recipe) -> str:
    """Write the resolved recipe as TOML; ``load_recipe`` reads it back with the origins."""
    # A file's name may hold a newline, which would end the comment.
    name = "".join(each if each.isprintable() else "?" for each in recipe.name)
    lines = [
        f"# {name}: all settings of this run. The comment behind each is its origin.",
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
    text = "\n".join(lines) + "\n"
    assert parse_recipe(text, [], name=recipe.name) == recipe, "it reads back as another recipe"
    return text
