"""The token dataset that a recipe, or ``minigpt tokenize``, asks for; with progress."""

from pathlib import Path
from typing import Any

from minigpt_cli.data.manifest import MANIFEST, Manifest
from minigpt_cli.data.sources import Source, listing
from minigpt_cli.data.tokenize import tokenize
from minigpt_cli.errors import UserError
from minigpt_cli.recipe import Recipe
from minigpt_cli.report.console import TokenizingDisplay, say, warn


def prepare_data(recipe: Recipe) -> None:
    """Make the token dataset that the recipe describes, unless it is there.

    Raises:
        UserError: it can't be made, or was made with other settings.
    """
    source, tokenizer = recipe.data.source, recipe.data.tokenizer
    if source is None:
        return
    assert tokenizer is not None
    path = Path(recipe.data_path)
    wanted = Source(source.kind, source.path, source.field, source.split, source.config)
    if (path / MANIFEST).exists():
        try:
            listing(wanted)
        except UserError:  # made elsewhere and brought here, as onto a cluster
            say(f"{path}: the text it was made from is not here; using it as it is")
            return
    make_dataset(
        wanted,
        path,
        tokenizer_path=tokenizer.path,
        train_vocab=tokenizer.train_vocab,
        val_fraction=source.val_fraction,
    )


def make_dataset(
    source: Source,
    out: Path,
    *,
    tokenizer_path: str | Path | None,
    train_vocab: int | None,
    val_fraction: float,
    strict: bool = False,
    workers: int | None = None,
) -> Manifest:
    """``tokenize`` with its progress and a summary on standard error."""
    if (tokenizer_path is None) == (train_vocab is None):
        raise UserError(
            "give a tokenizer (--tokenizer) or the size of one to train (--train-vocab)"
        )
    with TokenizingDisplay() as display:
        manifest = tokenize(
            source,
            out,
            tokenizer_path=tokenizer_path,
            train_vocab=train_vocab,
            val_fraction=val_fraction,
            strict=strict,
            workers=workers,
            progress=display.update,
            warn=warn,
        )
    for name, split in manifest.splits.items():
        say(
            f"{out} {name}: {split.documents:,} documents, {split.bytes:,} bytes, "
            f"{split.tokens:,} tokens"
        )
    if manifest.bad_lines:
        warn(f"{manifest.bad_lines:,} malformed lines were skipped")
    return manifest


def summary(manifest: Manifest, out: Path) -> dict[str, Any]:
    """What ``minigpt tokenize --json`` prints."""
    return {
        "path": str(out),
        "vocab_size": manifest.vocab_size,
        "dtype": manifest.dtype,
        "bad_lines": manifest.bad_lines,
        "splits": {
            name: {"tokens": split.tokens, "documents": split.documents, "bytes": split.bytes}
            for name, split in manifest.splits.items()
        },
    }
