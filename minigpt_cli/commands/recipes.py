"""``minigpt recipes``."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from minigpt_cli.commands.options import Debug, Json, Version
from minigpt_cli.core.console import discarded_if_closed, log, print_json, print_result
from minigpt_cli.core.signals import nothing_is_saved
from minigpt_cli.core.text_table import text_table

if TYPE_CHECKING:
    from minigpt_cli.recipe.shipped import ShippedRecipe

EXAMPLE = "minigpt recipes gpt2-124m > my.toml"


def recipes_command(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="A recipe to print; without it, all are listed."),
    ] = None,
    as_json: Json = False,
    version: Version = False,
    debug: Debug = False,
) -> None:
    """List the recipes that come with minigpt, or print one.

    A printed recipe is its file byte for byte, to start one's own from. Its first lines say how to
    launch it.
    """
    nothing_is_saved()
    from minigpt_cli.recipe.shipped import shipped_recipe, shipped_recipes

    if name is not None:
        recipe, content = shipped_recipe(name)
        if as_json:
            print_json(_as_json(recipe) | {"text": content.decode()})
            return
        _print_bytes(content)
        if b'"recipes/' in content:
            log(f"the files that it names under recipes/ are in {recipe.file.parent}")
        return
    found = shipped_recipes()
    if as_json:
        print_json({"recipes": [_as_json(recipe) for recipe in found]})
        return
    header = ["recipe", "trains", "parameters", "tokens", "hardware", "time"]
    print_result(text_table(header, [_row(recipe) for recipe in found], left=(0, 1, 4)))
    print_result(
        "\n~ by arithmetic, not measured. To start your own: minigpt recipes NAME > my.toml"
    )


def _row(recipe: "ShippedRecipe") -> list[str]:
    computed = "arithmetic" in recipe.facts["Time"]
    return [
        recipe.name,
        recipe.short("Model"),
        _rough(recipe.parameters),
        _rough(recipe.tokens),
        recipe.short("Hardware"),
        f"{'~' if computed else ''}{recipe.short('Time')}",
    ]


def _as_json(recipe: "ShippedRecipe") -> dict[str, Any]:
    return {
        "name": recipe.name,
        "about": recipe.about,
        "trains": recipe.short("Model"),
        "parameters": recipe.parameters,
        "tokens": recipe.tokens,
        "hardware": recipe.facts["Hardware"],
        "time": recipe.facts["Time"],
        "loss": recipe.facts["Loss"],
        "file": str(recipe.file),
    }


def _rough(count: int) -> str:
    """Return a count with three digits: 124M for 124,475,904."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _print_bytes(content: bytes) -> None:
    if sys.stdout is not None:  # it is closed: >&-
        with discarded_if_closed():
            sys.stdout.flush()
            sys.stdout.buffer.write(content)
            sys.stdout.flush()
