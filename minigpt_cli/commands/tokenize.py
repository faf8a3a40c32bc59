"""``minigpt tokenize``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from minigpt_cli.commands.options import OUTPUT, PROCESSES, Debug, Json, Version, option
from minigpt_cli.core.console import print_json
from minigpt_cli.core.constants import SHARD_TOKENS
from minigpt_cli.core.errors import UserError

EXAMPLE = "minigpt tokenize 'corpus/**/*.txt' --vocab-size 16384 -o data/mine"

SOURCE, TOKENIZER, INSTRUCTIONS = "Source", "Tokenizer", "Instructions"

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE",
        help="Text files, globs, .jsonl or .parquet files, a Hugging Face dataset (a directory or "
        "ORG/NAME), or python-stdlib. Text and .jsonl may be compressed (.gz, .xz, .zst).",
    ),
]
Out = Annotated[Path, option("--out -o", "DIR", "The token dataset to make.", OUTPUT)]
VocabSize = Annotated[
    int | None,
    option("--vocab-size", "N", "Train a byte-level BPE tokenizer with N tokens.", TOKENIZER),
]
TrainVocab = Annotated[
    int | None, typer.Option("--train-vocab", metavar="N", hidden=True)  # the option's old name
]
TokenizerPath = Annotated[
    Path | None,
    option(
        "--tokenizer",
        "PATH",
        "A tokenizer.json, or a directory with it or with vocab.json and merges.txt.",
        TOKENIZER,
    ),
]
Format = Annotated[
    Literal["text", "instructions"],
    option(
        "--format",
        None,
        "instructions: records with prompt and completion, or with messages.",
        INSTRUCTIONS,
    ),
]
ChatTemplate = Annotated[
    str | None,
    option(
        "--chat-template",
        "FILE",
        "A Jinja file for records with messages, or chatml; default: the tokenizer's.",
        INSTRUCTIONS,
    ),
]
TextField = Annotated[
    str, option("--text-field", "NAME", "The field of a record that holds its text.", SOURCE)
]
Split = Annotated[str, option("--split", "NAME", "The split of a Hugging Face dataset.", SOURCE)]
Config = Annotated[
    str | None, option("--config", "NAME", "The configuration of a Hugging Face dataset.", SOURCE)
]
Strict = Annotated[
    bool,
    option(
        "--strict/--no-strict",
        "",
        "End with an error at a malformed document, instead of skipping it.",
        SOURCE,
    ),
]
ValFraction = Annotated[
    float, option("--val-fraction", "X", "Share of the text for validation.", OUTPUT)
]
ShardTokens = Annotated[
    int, option("--shard-tokens", "N", "Tokens per file, at most.", OUTPUT, min=1)
]
Workers = Annotated[
    int | None, option("--workers", "N", "Processes; default: all cores.", PROCESSES)
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

    A killed command on text continues when it is run again.
    """
    from minigpt_cli.prepare.make_dataset import make_dataset, summary
    from minigpt_cli.prepare.sources import detect_source

    if vocab_size is not None and train_vocab is not None:
        raise UserError("--train-vocab is the old name of --vocab-size: give only --vocab-size")
    vocab_size = train_vocab if vocab_size is None else vocab_size
    source = detect_source(sources, text_field, split, config)
    if dataset_format == "instructions":
        text_only = {
            "--vocab-size": vocab_size is not None,
            "--text-field": text_field != "text",
            "--shard-tokens": shard_tokens != SHARD_TOKENS,
            "--workers": workers is not None,
        }
        if given := [name for name, is_given in text_only.items() if is_given]:
            raise UserError(
                f"{', '.join(given)}: not allowed with --format instructions, which needs an "
                "existing tokenizer (--tokenizer)"
            )
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
