"""What a plan knows of a recipe's data and base model, without making or downloading anything."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt_cli.core.reading import read_json
from minigpt_cli.data.dataset_manifest import is_dataset, read_dataset_manifest
from minigpt_cli.data.tokenizer import is_tokenizer, load_tokenizer, vocabulary_size
from minigpt_cli.huggingface.auxiliary_files import AuxiliaryFiles
from minigpt_cli.huggingface.base_model import BaseModel, complete_recipe, open_base
from minigpt_cli.huggingface.weights import CONFIG
from minigpt_cli.model.hf_names import config_from_huggingface
from minigpt_cli.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

ASSUMED_VOCABULARY = 50_257  # GPT-2's


@dataclass(frozen=True)
class PlannedData:
    """The sizes of a dataset.

    Attributes:
        vocab_size: of the tokenizer.
        vocab_source: where that number comes from: "the dataset", a setting, a tokenizer's path, or
            "assumed".
        train_tokens, val_tokens: of the splits; None without a dataset.
        train_sequences, val_sequences: of the recipe's length; None without a dataset.
        is_packed: whether sequences hold several examples; their number is then an estimate.
    """

    vocab_size: int
    vocab_source: str
    train_tokens: int | None = None
    val_tokens: int | None = None
    train_sequences: int | None = None
    val_sequences: int | None = None
    is_packed: bool = False


def complete_from_base(recipe: Recipe) -> tuple[Recipe, str | None]:
    """Fill in ``[model]`` from the base model, if there is one on this machine.

    Returns:
        (the recipe, why its model isn't known), the latter None if it is known.

    Raises:
        UserError: the base model is damaged or contradicts the recipe.
    """
    if recipe.base is None:
        return recipe, None
    path = Path(recipe.base).expanduser()
    directory = path if path.is_dir() else _downloaded(recipe.base)
    if directory is None:
        return recipe, (
            f"the base model {recipe.base} is not on this machine: train or download it first "
            "(hf download ORG/NAME)"
        )
    if (directory / CONFIG).is_file():
        config = config_from_huggingface(read_json(directory / CONFIG), str(directory / CONFIG))
        base = BaseModel(
            name=recipe.base,
            directory=directory,
            config=config,
            tokenizer=directory,
            auxiliary_files=AuxiliaryFiles(),
            read=_reads_nothing,
            report="",
        )
    else:
        base = open_base(path)
    return complete_recipe(recipe, base), None


def _reads_nothing(name: str) -> "Tensor":
    raise AssertionError(f"a plan reads no weights: {name}")


def _downloaded(name: str) -> Path | None:
    """Return the directory of a model that was downloaded from the Hub before."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, CONFIG)
    except HFValidationError:  # a path
        return None
    return Path(found).parent if isinstance(found, str) else None


def planned_data(recipe: Recipe) -> PlannedData:
    """Return the sizes of the recipe's dataset, or what can be known without it.

    Raises:
        UserError: a tokenizer can't be read.
        Damaged: the dataset's manifest is damaged.
    """
    path, length = Path(recipe.data_path), recipe.train.sequence_length
    if is_dataset(path):
        manifest = read_dataset_manifest(path)
        train, val = manifest.splits["train"].tokens, manifest.splits["val"].tokens
        packed = manifest.has_loss_mask
        return PlannedData(
            vocab_size=manifest.vocab_size,
            vocab_source="the dataset",
            train_tokens=train,
            val_tokens=val,
            train_sequences=_sequences(train, length, packed),
            val_sequences=_sequences(val, length, packed),
            is_packed=packed,
        )
    source, given = recipe.data.source, recipe.data.tokenizer
    packed = source is not None and source.format == "instructions"
    size, where = ASSUMED_VOCABULARY, "assumed"
    if given is not None and given.train_vocab is not None:
        size, where = given.train_vocab, "data.tokenizer.train_vocab"
    elif given is not None and given.path is not None and is_tokenizer(Path(given.path)):
        size, where = vocabulary_size(load_tokenizer(given.path)), given.path
    if recipe.model.vocab_size is not None and (where == "assumed" or recipe.base is not None):
        size, where = recipe.model.vocab_size, "model.vocab_size"
    return PlannedData(size, where, is_packed=packed)


def _sequences(tokens: int, length: int, is_packed: bool) -> int:
    """Return the sequences of a split; each needs one token more than it predicts."""
    return -(-tokens // length) if is_packed else max(0, (tokens - 1) // length)
