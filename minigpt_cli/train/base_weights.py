"""The base model of a run: open it on every rank, complete the recipe from it, load its weights."""

from dataclasses import replace
from pathlib import Path

from minigpt_cli.core.console import log, warn
from minigpt_cli.core.errors import UserError
from minigpt_cli.data.sequences import TrainingData
from minigpt_cli.data.tokenizer import is_tokenizer, load_tokenizer, tokenizer_fingerprint
from minigpt_cli.distributed.parallel import copy_full_tensor, fill_own_rows
from minigpt_cli.distributed.world import World
from minigpt_cli.huggingface.auxiliary_files import AuxiliaryFiles, chat_template, files_beside
from minigpt_cli.huggingface.base_model import (
    BaseModel,
    complete_recipe,
    load_base,
    open_base,
    weights_fingerprint,
    with_tokenizer,
)
from minigpt_cli.model import lora
from minigpt_cli.model.gpt import GPT, initialize_weights, meta_model
from minigpt_cli.recipe import Recipe


def open_recipe_base(recipe: Recipe, world: World) -> tuple[BaseModel | None, str | None]:
    """Open the recipe's base model on every rank. Rank 0 goes first and downloads it if needed.

    Returns:
        (the base, the fingerprint of its weights), or (None, None) if the recipe has no base.

    Raises:
        UserError: there is no such model, or the ranks don't find the same weights.
    """
    if (name := recipe.base) is None:
        return None, None

    opened: list[BaseModel] = []  # on rank 0

    def open_first() -> str:
        opened.append(open_base(name))
        return weights_fingerprint(opened[0])

    fingerprint = world.run_on_rank0(open_first, str)
    base = opened[0] if opened else open_base(name)
    if any(world.all_reduce_max(not opened and weights_fingerprint(base) != fingerprint)):
        raise UserError(f"{name}: the ranks find different weights under this name")
    return base, fingerprint


def start_from_base(recipe: Recipe, base: BaseModel) -> tuple[Recipe, BaseModel]:
    """Return the recipe with its model section completed, and the base with a tokenizer.

    Everything that can be wrong is checked here, before the data is prepared.

    Raises:
        UserError: recipe and base don't fit together.
    """
    log(base.report)
    base = _with_recipe_tokenizer(base, recipe)
    recipe = complete_recipe(recipe, base)
    if recipe.lora is not None:
        lora.target_layers(meta_model(base.config), recipe.lora.target_modules)
    given = recipe.data.tokenizer.path if recipe.data.tokenizer is not None else None
    if given is not None and given != str(base.tokenizer):
        check_base_tokenizer(given, base, tokenizer_fingerprint(load_tokenizer(given)))
    return recipe, base


def auxiliary_files_of(recipe: Recipe, base: BaseModel | None) -> AuxiliaryFiles:
    """Return the auxiliary files of the base or, for chats without any, of the tokenizer.

    They hold the chat template that conversations are rendered with in training.
    """
    of_base = AuxiliaryFiles() if base is None else base.auxiliary_files
    source, tokenizer = recipe.data.source, recipe.data.tokenizer
    is_chat = source is not None and source.format == "instructions"
    if of_base.files or not is_chat or tokenizer is None or tokenizer.path is None:
        return of_base
    return replace(of_base, files=files_beside(Path(tokenizer.path)))


def model_template_of(
    recipe: Recipe, auxiliary_files: AuxiliaryFiles
) -> tuple[str | None, dict[str, str]] | None:
    """Return the chat template and the special tokens of the base's files.

    None if there are no such files, or if the recipe has no instructions to render.
    """
    source, tokenizer = recipe.data.source, recipe.data.tokenizer
    if source is None or source.format != "instructions" or not auxiliary_files.files:
        return None
    assert tokenizer is not None
    return chat_template(Path(str(tokenizer.path)), auxiliary_files)


def load_recipe_base(recipe: Recipe, base: BaseModel, model: GPT) -> None:
    """Load the base's weights into a model, and initialize its adapters if it has any."""
    load_base(base, model, copy_full_tensor)
    if recipe.lora is not None:
        lora.initialize_adapters(model, recipe.train.seed, base.read, fill_own_rows)


def fill_first_weights(
    recipe: Recipe, base: BaseModel | None, data: TrainingData, model: GPT
) -> None:
    """Give a model the weights that training starts from: the base's, or random ones.

    Raises:
        UserError: the data was made with another tokenizer than the base's.
    """
    if base is None:
        initialize_weights(model, recipe.train.seed, fill_own_rows)
        return
    check_base_tokenizer(recipe.data_path, base, data.fingerprints["tokenizer"])
    load_recipe_base(recipe, base, model)


def check_base_tokenizer(place: str, base: BaseModel, fingerprint: str) -> None:
    """Refuse a tokenizer other than the base's: the same ids would mean other tokens.

    Args:
        place: the tokenizer or dataset that is checked, for the message.
        base: the base model.
        fingerprint: of the tokenizer that is checked.

    Raises:
        UserError: it is another one.
    """
    if tokenizer_fingerprint(load_tokenizer(base.tokenizer)) != fingerprint:
        raise UserError(
            f"{place}: its tokenizer is not that of {base.name}; leave out [data.tokenizer], or "
            f'set path = "{base.tokenizer}", and prepare the data with it'
        )


def _with_recipe_tokenizer(base: BaseModel, recipe: Recipe) -> BaseModel:
    """Return the base, with the recipe's tokenizer if it has none."""
    if is_tokenizer(base.tokenizer):
        return base
    given = recipe.data.tokenizer
    if given is None or given.path is None:
        raise UserError(
            f"{base.name}: has no tokenizer that minigpt reads (tokenizer.json, or vocab.json and "
            "merges.txt): set [data.tokenizer] path to the tokenizer it was trained with"
        )
    load_tokenizer(given.path)  # raises if it is damaged
    warn(f"{base.name}: has no tokenizer; was it trained with {given.path}?")
    return with_tokenizer(base, Path(given.path))
