"""The token dataset that a recipe, or ``minigpt tokenize``, asks for; with progress."""

from pathlib import Path
from typing import Any

from minigpt_cli.core.console import log, warn
from minigpt_cli.core.errors import UserError
from minigpt_cli.data import chat
from minigpt_cli.data.dataset_manifest import MANIFEST, DatasetManifest
from minigpt_cli.data.instruction_dataset import is_instructions
from minigpt_cli.huggingface.base_model import AuxiliaryFiles, chat_template
from minigpt_cli.prepare.instructions import make_instructions
from minigpt_cli.prepare.progress import TokenizingDisplay
from minigpt_cli.prepare.sources import Source, listing
from minigpt_cli.prepare.tokenize import tokenize
from minigpt_cli.recipe import DataSource, Recipe


def prepare_data(recipe: Recipe, auxiliary_files: AuxiliaryFiles | None = None) -> None:
    """Make the dataset that the recipe describes, unless it is there.

    Args:
        auxiliary_files: of the base, which may bring a chat template.

    Raises:
        UserError: it can't be made, or was made with other settings.
    """
    source, tokenizer = recipe.data.source, recipe.data.tokenizer
    if source is None:
        return
    assert tokenizer is not None
    path = Path(recipe.data_path)
    wanted = Source(source.kind, source.path, source.field, source.split, source.config)
    if (path / MANIFEST).exists() or is_instructions(path):
        try:
            listing(wanted)
        except UserError:  # made elsewhere and brought here, as onto a cluster
            log(f"{path}: the text it was made from is not here; using it as it is")
            return
    if source.format == "instructions":
        _make_instructions(
            wanted, path, source, str(tokenizer.path), auxiliary_files or AuxiliaryFiles()
        )
        return
    make_dataset(
        wanted,
        path,
        tokenizer_path=tokenizer.path,
        train_vocab=tokenizer.train_vocab,
        val_fraction=source.val_fraction,
    )


def _make_instructions(
    wanted: Source, path: Path, source: DataSource, tokenizer: str, auxiliary_files: AuxiliaryFiles
) -> None:
    template, variables = chat_template(Path(tokenizer), auxiliary_files)
    if source.chat_template == "chatml":
        template = chat.CHATML
    elif source.chat_template is not None:
        try:
            template = Path(source.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"[data.source] chat_template {source.chat_template} can't be read: {error}; "
                "give a file, or chatml"
            ) from None
    manifest = make_instructions(
        wanted,
        path,
        tokenizer_path=tokenizer,
        chat_template=template,
        variables=variables,
        val_fraction=source.val_fraction,
        warn=warn,
    )
    for name, split in manifest.splits.items():
        log(
            f"{path} {name}: {split.examples:,} examples, {split.tokens:,} tokens, "
            f"{split.trained_tokens:,} of them trained"
        )
    if manifest.malformed:
        warn(f"{path}: {manifest.malformed:,} malformed records were skipped")


def make_dataset(
    source: Source,
    out: Path,
    *,
    tokenizer_path: str | Path | None,
    train_vocab: int | None,
    val_fraction: float,
    shard_tokens: int = 100_000_000,
    strict: bool = False,
    workers: int | None = None,
) -> DatasetManifest:
    """``tokenize`` with its progress and a summary on standard error."""
    if (tokenizer_path is None) == (train_vocab is None):
        raise UserError("give a tokenizer (--tokenizer) or the size of one to train (--vocab-size)")
    with TokenizingDisplay() as display:
        manifest = tokenize(
            source,
            out,
            tokenizer_path=tokenizer_path,
            train_vocab=train_vocab,
            val_fraction=val_fraction,
            shard_tokens=shard_tokens,
            strict=strict,
            workers=workers,
            progress=display.update,
            warn=warn,
        )
    for name, split in manifest.splits.items():
        log(
            f"{out} {name}: {split.documents:,} documents, {split.bytes:,} bytes, "
            f"{split.tokens:,} tokens"
        )
    if manifest.bad_lines:
        warn(f"{manifest.bad_lines:,} malformed lines were skipped")
    return manifest


def summary(manifest: DatasetManifest, out: Path) -> dict[str, Any]:
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
