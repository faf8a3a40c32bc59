"""``minigpt tokenize``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from minigpt_cli.commands.options import OUTPUT, PROCESSES, Debug, Json, Version
from minigpt_cli.core.console import print_json
from minigpt_cli.core.errors import UserError

EXAMPLE = "minigpt tokenize 'corpus/**/*.txt' --vocab-size 16384 -o data/mine"

SHARD_TOKENS = 100_000_000
SOURCE, TOKENIZER, INSTRUCTIONS = "Source", "Tokenizer", "Instructions"

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE",
        help="Text files, globs, .jsonl or .parquet files, a Hugging Face dataset (a directory or "
        "ORG/NAME), or python-stdlib.",
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", metavar="DIR", help="The token dataset to make.", rich_help_panel=OUTPUT
    ),
]
VocabSize = Annotated[
    int | None,
    typer.Option(
        "--vocab-size",
        metavar="N",
        help="Train a byte-level BPE tokenizer with N tokens.",
        rich_help_panel=TOKENIZER,
    ),
]
TrainVocab = Annotated[
    int | None, typer.Option("--train-vocab", metavar="N", hidden=True)  # the option's old name
]
TokenizerPath = Annotated[
    Path | None,
    typer.Option(
        "--tokenizer",
        metavar="PATH",
        help="Use this tokenizer: a tokenizer.json, or a directory with it or with vocab.json and "
        "merges.txt.",
        rich_help_panel=TOKENIZER,
    ),
]
Format = Annotated[
    Literal["text", "instructions"],
    typer.Option(
        "--format",
        help="instructions: records with prompt and completion, or with messages.",
        rich_help_panel=INSTRUCTIONS,
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        "--chat-template",
        metavar="FILE",
        help="A Jinja file for records with messages, or chatml; default: the tokenizer's.",
        rich_help_panel=INSTRUCTIONS,
    ),
]
TextField = Annotated[
    str,
    typer.Option(
        "--text-field",
        metavar="NAME",
        help="The field of a record that holds its text.",
        rich_help_panel=SOURCE,
    ),
]
Split = Annotated[
    str,
    typer.Option(
        "--split",
        metavar="NAME",
        help="The split of a Hugging Face dataset.",
        rich_help_panel=SOURCE,
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        metavar="NAME",
        help="The configuration of a Hugging Face dataset.",
        rich_help_panel=SOURCE,
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict/--no-strict",
        help="End with an error at a malformed document, instead of skipping it.",
        rich_help_panel=SOURCE,
    ),
]
ValFraction = Annotated[
    float,
    typer.Option(
        "--val-fraction",
        metavar="X",
        help="Share of documents for validation.",
        rich_help_panel=OUTPUT,
    ),
]
ShardTokens = Annotated[
    int,
    typer.Option(
        "--shard-tokens",
        metavar="N",
        min=1,
        help="Tokens per file, at most.",
        rich_help_panel=OUTPUT,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", metavar="N", help="Processes; default: all cores.", rich_help_panel=PROCESSES
    ),
]


def tokenize_command(
    sources: Sources,
    out: Out,
    vocab_size: VocabSize = None,
    train_vocab: TrainVocab = None,
    tokenizer: TokenizerPath = None,
    text_field: TextField = "text",
    split: Split = "train",
    config: Config = None,
    strict: Strict = False,
    dataset_format: Format = "text",
    chat_template: ChatTemplate = None,
    val_fraction: ValFraction = 0.05,
    shard_tokens: ShardTokens = SHARD_TOKENS,
    workers: Workers = None,
    as_json: Json = False,
    version: Version = False,
    debug: Debug = False,
) -> None:
    """Turn text into a token dataset.

    A command that was killed continues when it is run again.
    """
    from minigpt_cli.prepare.make_dataset import make_dataset, summary
    from minigpt_cli.prepare.sources import detect_source

    vocab_size = train_vocab if vocab_size is None else vocab_size
    if (tokenizer is None) == (vocab_size is None):
        raise UserError("give either --tokenizer PATH, or --vocab-size N to train a tokenizer")
    source = detect_source(sources, text_field, split, config)
    if dataset_format == "instructions":
        text_only = {
            "--vocab-size": vocab_size is not None,
            "--text-field": text_field != "text",
            "--shard-tokens": shard_tokens != SHARD_TOKENS,
            "--workers": workers is not None,
        }
        if given := [name for name, is_given in text_only.items() if is_given]:
            raise UserError(f"{', '.join(given)}: not allowed with --format instructions")
    elif chat_template is not None:
        raise UserError("--chat-template: only allowed with --format instructions")
    manifest = make_dataset(
        source,
        out,
        format=dataset_format,
        tokenizer_path=tokenizer,
        vocab_size=vocab_size,
        chat_template=chat_template,
        val_fraction=val_fraction,
        shard_tokens=shard_tokens,
        strict=strict,
        workers=workers,
    )
    if as_json:
        print_json(summary(manifest, out))
