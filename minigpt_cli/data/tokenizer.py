"""Tokenizers: train a byte-level BPE, load one from disk, and tell whether two are the same.

Every tokenizer that leaves this module encodes text as text: the characters ``<|endoftext|>``
inside a document become ordinary tokens, never the special one, so only the end of a document ends
a document. Encode with ``add_special_tokens=False``; the end-of-text id is appended by
``tokenize.py``.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt_cli.core.errors import UserError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS = "<|endoftext|>"

# What other families call the end of a text, most specific first.
_OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "[EOS]")


def is_tokenizer(path: Path) -> bool:
    """Whether there is one that ``load_tokenizer`` could load."""
    pair = (path / "vocab.json", path / "merges.txt")
    return path.is_file() or (path / "tokenizer.json").is_file() or all(f.is_file() for f in pair)


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Load a tokenizer from ``tokenizer.json``, or a directory with it, or GPT-2's vocab.json +
    merges.txt.

    Truncation and padding are switched off, and special tokens in a text are encoded as text.
    Raises ``UserError`` when nothing is there or what is there can't be read.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    path = Path(path)
    folder = path.parent if path.name in ("vocab.json", "merges.txt") else path
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    file = folder / "tokenizer.json" if path.is_dir() else path
    try:
        if file.is_file() and file.name != "vocab.json" and file.name != "merges.txt":
            tokenizer = Tokenizer.from_file(str(file))
        elif vocab.is_file() and merges.is_file():
            file = vocab
            tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            tokenizer.decoder = decoders.ByteLevel()
            tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
            # The pair of files doesn't say which entries are special; in GPT-2's it is this one.
            if tokenizer.token_to_id(EOS) is not None:
                tokenizer.add_special_tokens([EOS])
        else:
            raise UserError(
                f"no tokenizer at {path}: give a tokenizer.json, a directory with one, "
                "or a directory with vocab.json and merges.txt"
            )
    except UserError:
        raise
    except Exception as error:  # tokenizers raises bare Exception for everything it can't parse
        raise UserError(
            f"{file} is not a tokenizer that can be read: {first_line(error)}"
        ) from None
    return as_text_only(tokenizer)


def eos_id(tokenizer: "Tokenizer") -> int:
    """Return the id of the end-of-text token; ``UserError`` when the tokenizer has none that is
    known.
    """
    for name in (EOS, *_OTHER_ENDS):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    raise UserError(
        f"the tokenizer has no end-of-text token (looked for {EOS}, {', '.join(_OTHER_ENDS)}); "
        "add one to its tokenizer.json"
    )


def vocabulary_size(tokenizer: "Tokenizer") -> int:
    """Return the number of ids a model needs: the largest id plus one (ids may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def tokenizer_fingerprint(tokenizer: "Tokenizer") -> str:
    """Return the sha256 (hex) of what decides how text becomes ids and ids become text.

    The post-processor, truncation and padding are left out since encoding here never uses them.
    Fields that are null or false are left out too, so that a newer `tokenizers` which writes one
    more option at its default doesn't change the fingerprint of an old tokenizer.
    """
    state = json.loads(tokenizer.to_str())
    kept = {name: state[name] for name in ("normalizer", "pre_tokenizer", "model", "decoder")}
    kept["added_tokens"] = sorted(state["added_tokens"], key=lambda token: int(token["id"]))
    merges = kept["model"].get("merges")
    if merges is not None:  # "a b" in older files, ["a", "b"] in newer ones
        kept["model"]["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
    text = json.dumps(_without_defaults(kept), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def token_byte_lengths(tokenizer: "Tokenizer") -> np.ndarray | None:
    """Return int32 [vocabulary]: the UTF-8 bytes that each id stands for, 0 for special tokens and
    gaps.

    None when the tokenizer isn't byte-level: then a token's bytes depend on its neighbours.
    """
    from tokenizers import pre_tokenizers

    decoder = json.loads(tokenizer.to_str())["decoder"]
    parts = decoder.get("decoders", [decoder]) if decoder else []
    if not any(part["type"] == "ByteLevel" for part in parts):
        return None
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    added = tokenizer.get_added_tokens_decoder()
    lengths = np.zeros(vocabulary_size(tokenizer), dtype=np.int32)
    for token, index in tokenizer.get_vocab(with_added_tokens=True).items():
        if index in added:
            lengths[index] = 0 if added[index].special else len(token.encode())
        elif alphabet.issuperset(token):  # one character of the alphabet stands for one byte
            lengths[index] = len(token)
        else:
            lengths[index] = len(token.encode())
    return lengths


def as_text_only(tokenizer: "Tokenizer") -> "Tokenizer":
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Not part of tokenizer.json: a property of the object, so it's set wherever one is made.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _without_defaults(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_defaults(item)
            for key, item in value.items()
            if item is not None and item is not False
        }
    if isinstance(value, list):
        return [_without_defaults(item) for item in value]
    return value
