"""Prepare the dataset that a recipe asks for."""

from pathlib import Path

from minigpt_cli.core.console import log
from minigpt_cli.core.errors import UserError
from minigpt_cli.data.chat import ModelTemplate
from minigpt_cli.data.dataset_manifest import is_dataset
from minigpt_cli.prepare.make_dataset import make_dataset
from minigpt_cli.prepare.sources import Source, listing
from minigpt_cli.recipe import Recipe


def prepare_data(recipe: Recipe, model_template: ModelTemplate | None = None) -> None:
    """Make the recipe's dataset, unless it is there or the recipe names no source.

    Args:
        recipe: Says where the text is, and how it becomes a dataset.
        model_template: The chat template and the special tokens that came with the base model. None
            takes what lies beside the tokenizer.

    Raises:
        UserError: The dataset can't be made, or was made with other settings.
        Damaged: Files of an unfinished dataset were changed.
    """
    source, tokenizer = recipe.data.source, recipe.data.tokenizer
    if source is None:
        return
    assert tokenizer is not None
    path = Path(recipe.data_path)
    text = Source(source.kind, source.path, source.field, source.split, source.config)
    if is_dataset(path):
        try:
            listing(text)
        except UserError:  # the dataset was made elsewhere and copied here, as onto a cluster
            log(f"{path}: the text that it was made from is not here; using the dataset as it is")
            return
    make_dataset(
        text,
        path,
        format=source.format,
        tokenizer_path=tokenizer.path,
        vocab_size=tokenizer.train_vocab,
        chat_template=source.chat_template,
        model_template=model_template,
        val_fraction=source.val_fraction,
    )
