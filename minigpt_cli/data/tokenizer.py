"""Load tokenizers and compare them.

Every tokenizer from this module encodes special tokens in a text as text: the characters
``<|endoftext|>`` inside a document become ordinary tokens. So no text can end a document early.
Encode with ``add_special_tokens=False``; ``prepare/`` appends the end-of-text id.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.core.reading import MAX_TOKENIZER_BYTES, parse_json, read_text
from minigpt_cli.data.untrusted import ConfinedTokenizer, confined

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EOS = "<|endoftext|>"
T = TypeVar("T")

# End-of-text tokens of other model families, most specific first.
_OTHER_ENDS = ("<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>", "[EOS]")

_MAX_VOCABULARY = 1 << 24  # the largest vocabularies have 260,000 tokens


def is_tokenizer(path: Path) -> bool:
    """Return True if ``path`` holds the files that `load_tokenizer` reads."""
    pair = (path / "vocab.json", path / "merges.txt")
    return path.is_file() or (path / "tokenizer.json").is_file() or all(f.is_file() for f in pair)


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """Load a tokenizer, without truncation and padding.

    One with other parts than GPT-2's and minigpt's own have encodes and decodes in a child process,
    because its patterns may take for ever (`untrusted.py`).

    Args:
        path: a tokenizer.json, a directory with one, or one with GPT-2's vocab.json and merges.txt.

    Returns:
        The tokenizer. It encodes special tokens in a text as text.

    Raises:
        UserError: there is no tokenizer, or it can't be read.
    """
    file = _file_of(Path(path))
    if file.name == "vocab.json":
        tokenizer = _from_pair(file)
    else:
        invalid = f"{file} is not a valid tokenizer"
        text = _checked_text(file)
        if not _is_plain(parse_json(text, invalid)):
            found = confined(text, invalid)
            return cast("Tokenizer", _checked_size(replace(found, what=str(file)), file))
        tokenizer = _from_text(text, file)
    return _checked_size(as_text_only(tokenizer), file)


def load_tokenizer_here(path: str | Path) -> "Tokenizer":
    """Load a tokenizer that this process encodes with; only for a child with limits."""
    file = _file_of(Path(path))
    is_pair = file.name == "vocab.json"
    return as_text_only(_from_pair(file) if is_pair else _from_text(_checked_text(file), file))


def recognising_special_tokens(tokenizer: "Tokenizer") -> "Tokenizer":
    """Return a copy of a tokenizer that encodes a special token in a text as the token.

    It is for what a chat template wrote.
    """
    from tokenizers import Tokenizer

    if isinstance(tokenizer, ConfinedTokenizer):
        return cast("Tokenizer", replace(tokenizer, encode_special_tokens=False))
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = False
    return copy


def _file_of(path: Path) -> Path:
    """Return the tokenizer.json, or the vocab.json of a pair."""
    folder = path.parent if path.name in ("vocab.json", "merges.txt") else path
    file = folder / "tokenizer.json" if path.is_dir() else path
    if file.is_file() and file.name != "vocab.json" and file.name != "merges.txt":
        return file
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return folder / "vocab.json"
    raise UserError(
        f"no tokenizer at {path}: give a tokenizer.json, a directory with one, "
        "or a directory with vocab.json and merges.txt"
    )


def _checked_text(file: Path) -> str:
    """Return the text of a tokenizer.json."""
    try:
        return read_text(file, limit=MAX_TOKENIZER_BYTES)
    except UserError as error:
        raise UserError(f"{file} is not a valid tokenizer: {error}") from None


def _from_text(text: str, file: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    with _tokenizer_errors(f"{file} is not a valid tokenizer"):
        return Tokenizer.from_str(text)


def _from_pair(vocab: Path) -> "Tokenizer":
    """Load GPT-2's two files."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    invalid, merges = f"{vocab} is not a valid tokenizer", vocab.with_name("merges.txt")
    lines = [line for line in read_text(merges).splitlines() if not line.startswith("#version")]
    if not _merges_fit(parse_json(_checked_text(vocab), invalid), lines):
        raise UserError(f"{invalid}: {merges.name} merges to a token that is not in it")
    with _tokenizer_errors(invalid):
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    # The two files don't say which entries are special. In GPT-2's it is this one.
    if tokenizer.token_to_id(EOS) is not None:
        tokenizer.add_special_tokens([EOS])
    return tokenizer


@contextlib.contextmanager
def _tokenizer_errors(what: str) -> Iterator[None]:
    """Turn every error of the library `tokenizers` into one line that begins with ``what``."""
    try:
        yield
    except BaseException as error:  # it raises bare Exception; a panic of Rust is not even that
        if isinstance(error, UserError | MemoryError) or not (
            isinstance(error, Exception) or type(error).__name__ == "PanicException"
        ):
            raise
        raise UserError(f"{what}: {first_line(error)}") from None


def _is_plain(content: dict[str, Any]) -> bool:
    """Return whether a tokenizer.json has only the parts that GPT-2's and minigpt's own have.

    Their time and memory grow with the text, whatever the vocabulary: bytes, a fixed pattern, BPE.
    """
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        return False
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    parts = [content.get(name) for name in ("pre_tokenizer", "decoder", "post_processor")]
    types = [part.get("type") if isinstance(part, dict) else part for part in parts]
    return (
        content.get("normalizer") is None
        and types in (["ByteLevel"] * 3, ["ByteLevel", "ByteLevel", None])
        and not any(model.get(name) for name in options)
        and _merges_fit(model.get("vocab"), model.get("merges"))
    )


def _merges_fit(vocab: Any, merges: Any) -> bool:
    """Return whether each merge makes a token of the vocabulary; else the library may panic."""
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        return False
    try:
        return all("".join(m.split(" ") if isinstance(m, str) else m) in vocab for m in merges)
    except TypeError:  # a number, or a list of others than texts
        return False


def _checked_size(tokenizer: T, file: Path) -> T:
    """Refuse ids for which no model has room: arrays as long as the largest id would be made."""
    if (size := vocabulary_size(cast("Tokenizer", tokenizer))) > _MAX_VOCABULARY:
        raise UserError(
            f"{file}: its largest token id is {size - 1:,}, and minigpt reads ids below "
            f"{_MAX_VOCABULARY:,}: use another tokenizer"
        )
    return tokenizer


def eos_id(tokenizer: "Tokenizer") -> int:
    """Return the id of the end-of-text token.

    Raises:
        UserError: the tokenizer has no known end-of-text token.
    """
    for name in (EOS, *_OTHER_ENDS):
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    raise UserError(
        f"the tokenizer has no end-of-text token (looked for {EOS}, {', '.join(_OTHER_ENDS)}): "
        "add one to its tokenizer.json"
    )


def vocabulary_size(tokenizer: "Tokenizer") -> int:
    """Return the number of ids a model needs: the largest id plus one (ids may have gaps)."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def tokenizer_fingerprint(tokenizer: "Tokenizer") -> str:
    """Return a sha256 (hex) that is the same for tokenizers that encode and decode the same.

    It leaves out the post-processor, truncation and padding, which encoding here never uses. It
    also leaves out fields that are null or false: a newer `tokenizers` may write one more option
    at its default.
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
    """Count the UTF-8 bytes that each id stands for.

    Returns:
        int32 [vocabulary size], 0 for special tokens and gaps. None if the tokenizer isn't
        byte-level: then a token's bytes depend on its neighbours.
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
    """Switch off truncation and padding, and encode special tokens in a text as text."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # Not saved in tokenizer.json, so it is set on each new object.
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
