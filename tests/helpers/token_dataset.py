"""Token datasets of known tokens."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_cli.data.dataset import TokenDataset, open_dataset
from minigpt_cli.data.dataset_manifest import DatasetManifest, Split, write_dataset_manifest
from minigpt_cli.data.tokenizer import tokenizer_fingerprint
from minigpt_cli.prepare.bpe import train_bpe
from minigpt_cli.prepare.writer import ShardWriter

VOCAB = 300


@lru_cache(maxsize=1)
def tiny_tokenizer() -> Any:
    return train_bpe(iter(["some text, some words " * 30]), 280)


def build_dataset(
    path: Path, tokens: np.ndarray, shard_tokens: int, tokenizer: Any = None, dtype: str = "uint16"
) -> TokenDataset:
    """Write a dataset whose training split holds ``tokens``, and open it."""
    tokenizer = tokenizer or tiny_tokenizer()
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer.to_str())
    writer = ShardWriter(path, "train", dtype, shard_tokens)
    writer.write(tokens.astype(dtype))
    shards = writer.finish()
    writer.close()
    manifest = DatasetManifest(
        splits={"train": Split(shards, len(tokens), 1, 5), "val": Split((), 0, 0, 0)},
        eos_id=0,
        dtype=dtype,
        vocab_size=VOCAB,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        tokenizer_sha256="written by hand",
        source={"kind": "files"},
        source_fingerprint="",
        bad_lines=0,
        settings={},
        minigpt_version="0",
    )
    write_dataset_manifest(path, manifest)
    return open_dataset(path)
