"""Make a dataset of text or of instructions: for ``minigpt tokenize`` and for recipes."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from minigpt_cli.core.console import counted, log, warn
from minigpt_cli.core.constants import SHARD_TOKENS
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.reading import read_text
from minigpt_cli.data.chat import CHATML, ModelTemplate, template_and_tokens
from minigpt_cli.data.dataset_manifest import SPLITS, DatasetManifest
from minigpt_cli.prepare.instructions import make_instructions
from minigpt_cli.prepare.progress import progress_display
from minigpt_cli.prepare.sources import Source
from minigpt_cli.prepare.tokenize import tokenize


def make_dataset(
    source: Source,
    out: Path,
    *,
    format: Literal["text", "instructions"] = "text",
    tokenizer_path: str | Path | None = None,
    vocab_size: int | None = None,
    chat_template: str | None = None,
    model_template: ModelTemplate | None = None,
    val_fraction: float = 0.05,
    shard_tokens: int = SHARD_TOKENS,
    strict: bool = False,
    workers: int | None = None,
    show: bool = True,
) -> DatasetManifest:
    """Make the dataset in ``out``, with progress and a summary on standard error.

    A dataset that was made before with the same settings is returned at once.

    Args:
        source: What to read.
        out: The dataset's directory.
        format: "text", or "instructions": records with prompt and completion, or messages.
        tokenizer_path: A tokenizer's file or directory.
        vocab_size: The size of a tokenizer to train instead; for text only.
        chat_template: A Jinja file for conversations, or "chatml". None takes ``model_template``.
        model_template: The template that came with the model. None takes what lies beside the
            tokenizer.
        val_fraction: The share of the text, or of the examples, for validation.
        shard_tokens: Tokens per file, at most; for text only.
        strict: Refuse malformed lines and records, instead of skipping them.
        workers: Processes that encode text; None means one per core.
        show: Whether to show progress and the summary.

    Returns:
        The dataset's manifest.

    Raises:
        UserError: A setting or the source is wrong, or ``out`` holds something else.
        Damaged: Files of an unfinished dataset in ``out`` were changed.
    """
    if format == "instructions":
        if tokenizer_path is None:
            raise UserError(
                f"{out}: instructions need a tokenizer: give its file or directory "
                "(--tokenizer, or [data.tokenizer] path)"
            )
        template, variables = model_template or template_and_tokens(Path(tokenizer_path))
        manifest = make_instructions(
            source,
            out,
            tokenizer_path=tokenizer_path,
            chat_template=template if chat_template is None else _read_template(chat_template),
            variables=variables,
            val_fraction=val_fraction,
            warn=_refuse if strict else warn,
        )
    else:
        with progress_display() if show else nullcontext() as display:
            manifest = tokenize(
                source,
                out,
                tokenizer_path=tokenizer_path,
                train_vocab=vocab_size,
                val_fraction=val_fraction,
                shard_tokens=shard_tokens,
                strict=strict,
                workers=workers,
                progress=display,
                warn=warn,
            )
    if show:
        _log_summary(manifest, out)
    return manifest


def _log_summary(manifest: DatasetManifest, out: Path) -> None:
    noun = "example" if manifest.has_loss_mask else "document"
    for name, split in manifest.splits.items():
        parts = [
            counted(split.documents, noun),
            counted(split.bytes, "byte"),
            counted(split.tokens, "token"),
        ]
        masked = "" if split.loss_tokens is None else f", {split.loss_tokens:,} of them in the loss"
        log(f"{out} {name}: {', '.join(parts)}{masked}")
    asked = manifest.settings["val_fraction"]
    of = "examples" if manifest.has_loss_mask else "text"
    log(f"{out}: validation is {_val_share(manifest):.2%} of the {of} ({asked:.2%} was asked for)")
    asked_size = _asked_vocab_size(manifest)
    if asked_size is not None and manifest.vocab_size < asked_size:
        warn(
            f"{out}: the vocabulary has {manifest.vocab_size:,} entries instead of {asked_size:,}: "
            "the text has no more to merge"
        )
    if manifest.bad_lines:
        were = "was" if manifest.bad_lines == 1 else "were"
        is_table = manifest.source.get("kind") in ("parquet", "huggingface")
        noun = "malformed record" if manifest.has_loss_mask or is_table else "malformed line"
        warn(f"{out}: {counted(manifest.bad_lines, noun)} {were} skipped")


def _val_share(manifest: DatasetManifest) -> float:
    """Return the share of the text's bytes that is validation; of instructions, of the examples."""
    train, val = (
        split.documents if manifest.has_loss_mask else split.bytes
        for split in (manifest.splits[name] for name in SPLITS)
    )
    return val / max(1, train + val)


def _asked_vocab_size(manifest: DatasetManifest) -> int | None:
    """Return the size that was asked for where a tokenizer was trained, else None."""
    size = str(manifest.settings.get("tokenizer")).removeprefix("bpe-")
    return int(size) if size.isdecimal() and len(size) < 10 else None


def summary(manifest: DatasetManifest, out: Path) -> dict[str, Any]:
    """Return what ``minigpt tokenize --json`` prints.

    ``val_share`` is the share of the bytes, or of the examples, that is validation.
    ``requested_vocab_size`` is null where no tokenizer was trained. In a dataset of instructions
    each example is a document, ``bytes`` counts the text that is in the loss, and ``loss_tokens``
    its tokens.
    """
    return {
        "path": str(out),
        "vocab_size": manifest.vocab_size,
        "requested_vocab_size": _asked_vocab_size(manifest),
        "val_share": _val_share(manifest),
        "dtype": manifest.dtype,
        "bad_lines": manifest.bad_lines,
        "splits": {
            name: {"tokens": split.tokens, "documents": split.documents, "bytes": split.bytes}
            | ({} if split.loss_tokens is None else {"loss_tokens": split.loss_tokens})
            for name, split in manifest.splits.items()
        },
    }


def _refuse(message: str) -> None:
    raise UserError(f"{message.removesuffix('; skipped')} (refused: strict)")


def _read_template(name: str) -> str:
    if name == "chatml":
        return CHATML
    try:
        return read_text(Path(name))
    except UserError as error:
        raise UserError(f"chat_template {error}; give a Jinja file, or chatml") from None
