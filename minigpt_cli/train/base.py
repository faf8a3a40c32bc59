"""What a run's weights come from: opened on every rank, checked, and loaded into the model."""

from dataclasses import replace
from pathlib import Path

from minigpt_cli.checkpoint import base as bases
from minigpt_cli.checkpoint.base import Base, Companions
from minigpt_cli.data.tokenizer import fingerprint, is_tokenizer, load_tokenizer
from minigpt_cli.distributed import parallel
from minigpt_cli.distributed.world import World
from minigpt_cli.errors import UserError
from minigpt_cli.model import lora
from minigpt_cli.recipe import Recipe
from minigpt_cli.report.console import warn
from minigpt_cli.train.run import Run


def open_base(recipe: Recipe, world: World) -> tuple[Base | None, str | None]:
    """What the recipe's weights come from, and its fingerprint; rank 0 fetches it, where it isn't
    here.

    Raises:
        UserError: there is no such thing, or the ranks don't find the same.
    """
    if (name := recipe.base) is None:
        return None, None

    opened: list[Base] = []  # on rank 0

    def first() -> str:
        opened.append(bases.open_base(name))
        return bases.fingerprint(opened[0])

    identity = world.run_on_rank0(first)
    base = opened[0] if opened else bases.open_base(name)
    if any(world.all_reduce_max(not opened and bases.fingerprint(base) != identity)):
        raise UserError(f"{name}: the ranks find different weights under this name")
    return base, identity


def with_tokenizer(base: Base, recipe: Recipe) -> Base:
    """The base, with the recipe's tokenizer if it brings none.

    Raises:
        UserError: the recipe names none either.
    """
    if is_tokenizer(base.tokenizer):
        return base
    given = recipe.data.tokenizer
    if given is None or given.path is None:
        raise UserError(
            f"{base.name}: brings no tokenizer that minigpt reads, which is a tokenizer.json, or "
            "vocab.json and merges.txt: name the one it was trained with as [data.tokenizer] path"
        )
    load_tokenizer(given.path)  # it says what is wrong with it
    warn(f"{base.name}: brings no tokenizer; was it trained with {given.path}?")
    return bases.with_tokenizer(base, Path(given.path))


def companions_of(recipe: Recipe, base: Base | None) -> Companions:
    """What came with the base, or stands beside the tokenizer that conversations are rendered
    with: they are rendered so, too, when the model is used."""
    theirs = Companions() if base is None else base.companions
    source, tokenizer = recipe.data.source, recipe.data.tokenizer
    is_chat = source is not None and source.format == "instructions"
    if theirs.files or not is_chat or tokenizer is None or tokenizer.path is None:
        return theirs
    return replace(theirs, files=bases.files_beside(Path(tokenizer.path)))


def load_base(recipe: Recipe, base: Base, run: Run) -> None:
    """The base's weights, and beside them adapters that change nothing yet."""
    bases.load_base(base, run.trainer.model, parallel.assign)
    if recipe.lora is not None:
        lora.initialize(run.trainer.model, recipe.train.seed, base.read, parallel.assign)


def check_tokenizer(what: str, base: Base, tokenizer: str) -> None:
    """Refuse a tokenizer, or data that was made with one, unless it is the one that the base was
    trained with: the same ids would mean other tokens.

    Args:
        tokenizer: its fingerprint.

    Raises:
        UserError: it is another one.
    """
    if fingerprint(load_tokenizer(base.tokenizer)) != tokenizer:
        raise UserError(
            f"{what}: is of another tokenizer than that of {base.name}; leave out "
            f'[data.tokenizer], or give path = "{base.tokenizer}", and make the data with it'
        )
