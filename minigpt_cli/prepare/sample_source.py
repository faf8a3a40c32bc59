"""A dataset of the beginning of a recipe's source, in seconds, for a look at it."""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from minigpt_cli.core.console import warn
from minigpt_cli.core.errors import UserError
from minigpt_cli.data.chat import ModelTemplate
from minigpt_cli.prepare.documents import documents
from minigpt_cli.prepare.instruction_records import instruction_records
from minigpt_cli.prepare.make_dataset import make_dataset
from minigpt_cli.prepare.progress import BadLines
from minigpt_cli.prepare.sources import Source
from minigpt_cli.recipe import DataSource, Recipe

_LEAST_BYTES = 1 << 20  # of text
_BYTES_PER_POSITION = 64  # so that there are about 16 sequences, however long they are


def prepare_sample(
    recipe: Recipe, folder: Path, model_template: ModelTemplate | None = None
) -> tuple[Recipe, int]:
    """Make a dataset of the first documents of the recipe's source in ``folder``.

    Args:
        recipe: names a source.
        folder: an empty directory, for everything that is made.
        model_template: see ``prepare_data``.

    Returns:
        (the recipe with this dataset, the number of documents in it). A tokenizer that is trained
        on so little text may have fewer entries than asked for.

    Raises:
        UserError: the source can't be read, or no dataset can be made of it.
    """
    source, tokenizer = recipe.data.source, recipe.data.tokenizer
    assert source is not None
    assert tokenizer is not None
    most = max(_LEAST_BYTES, _BYTES_PER_POSITION * recipe.train.sequence_length)
    file, count = folder / "sample.jsonl", 0
    with file.open("w", encoding="utf-8") as stream:
        for line in _first_records(source, most):
            stream.write(line + "\n")
            count += 1
    if not count:
        raise UserError(f"[data.source] {', '.join(source.path) or source.kind}: holds no text")
    make_dataset(
        Source("jsonl", (str(file),)),
        folder / "data",
        format=source.format,
        tokenizer_path=tokenizer.path,
        vocab_size=tokenizer.train_vocab,
        chat_template=source.chat_template,
        model_template=model_template,
        val_fraction=source.val_fraction,
        workers=1,
        show=False,
    )
    return replace(recipe, data=replace(recipe.data, path=str(folder / "data"))), count


def _first_records(source: DataSource, most: int) -> Iterator[str]:
    """Yield documents or instructions as lines of JSON, until they have ``most`` bytes of text."""
    bad = BadLines(warn)
    text = Source(source.kind, source.path, source.field, source.split, source.config)
    size = 0
    if source.format == "instructions":
        for _, record in instruction_records(text, bad):
            line = json.dumps(asdict(record))
            yield line
            size += len(line)
            if size >= most:
                return
        return
    document = b""
    for piece in documents(text, on_bad=bad):
        document += piece.data
        size += len(piece.data)
        if piece.last or size >= most:
            yield json.dumps({"text": document.decode()})
            document = b""
        if size >= most:
            return
