"""The recipes that come with minigpt, and the facts in their first lines.

A shipped recipe's first comment has lines like ``# Time: 1.5 hours, by arithmetic ...``. They say
what no setting says. tests/recipe/test_shipped.py compares them with the arithmetic.
"""

import difflib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.reading import read_bytes, read_text
from minigpt_cli.recipe.parse import load_recipe

FACTS = ("Model", "Hardware", "Time", "Loss")
_FACT = re.compile(rf"({'|'.join(FACTS)}): (.*)")


@dataclass(frozen=True)
class ShippedRecipe:
    """What a list of recipes shows.

    Attributes:
        name: the file's name without its ending.
        file: where it is installed.
        about: the first sentence of the file.
        facts: ``FACTS`` -> a sentence.
        tokens: how many it trains on.
    """

    name: str
    file: Path
    about: str
    facts: dict[str, str]
    tokens: int

    @property
    def parameters(self) -> int:
        """The parameters that it trains, as its first lines say."""
        found = re.search(r"([\d,]+) parameters", self.facts["Model"])
        assert found is not None, self.name
        return int(found[1].replace(",", ""))

    def short(self, fact: str) -> str:
        """Return the beginning of a fact: "1.5 hours" of "1.5 hours, by arithmetic ..."."""
        return re.split("[,;:]", self.facts[fact])[0]


def shipped_recipes() -> list[ShippedRecipe]:
    """Return all shipped recipes, by name.

    Raises:
        UserError: the recipes are not installed, or one is damaged.
    """
    return [_read(file) for file in _files()]


def shipped_recipe(name: str) -> tuple[ShippedRecipe, bytes]:
    """Return a shipped recipe and the content of its file.

    Args:
        name: as in the list; also with ``.toml``, or as a path.

    Raises:
        UserError: there is no such recipe.
    """
    files = {file.stem: file for file in _files()}
    wanted = Path(name).name.removesuffix(".toml")
    if wanted not in files:
        near = difflib.get_close_matches(wanted, files, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(f"{name}: no such recipe; {hint}minigpt recipes lists all")
    return _read(files[wanted]), read_bytes(files[wanted])


def _files() -> list[Path]:
    package = importlib.util.find_spec("minigpt_cli.recipes")
    folders = [] if package is None else package.submodule_search_locations or []
    files = [file for folder in folders for file in Path(folder).glob("*.toml")]
    if not files:
        raise UserError("the recipes are not installed: install minigpt again")
    return sorted(files, key=lambda file: file.stem)


def _read(file: Path) -> ShippedRecipe:
    recipe = load_recipe(file)
    paragraphs = _comment(read_text(file))
    facts: dict[str, str] = {}
    name = ""
    for line in paragraphs[-1]:
        if match := _FACT.fullmatch(line):
            name, line = match[1], match[2]
        if name:
            facts[name] = f"{facts.get(name, '')} {line}".strip()
    missing = [each for each in FACTS if each not in facts]
    if missing:
        raise UserError(f"{file}: its first lines have no `# {missing[0]}: ...`")
    return ShippedRecipe(
        name=file.stem,
        file=file,
        about=_first_sentence(" ".join(paragraphs[0])),
        facts={each: _first_sentence(text) for each, text in facts.items()},
        tokens=recipe.total_steps * recipe.tokens_per_step,
    )


def _comment(text: str) -> list[list[str]]:
    """Return the paragraphs of the comment at the beginning of a file, each as its lines."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        if line == "#":
            paragraphs.append([])
        else:
            paragraphs[-1].append(line[1:].strip())
    return paragraphs


def _first_sentence(text: str) -> str:
    return re.split(r"\.(?:\s|$)", text, maxsplit=1)[0]
