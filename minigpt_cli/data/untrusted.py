"""Render templates and use tokenizers that came with a model, in a child process with limits.

This module is both: what asks the child, and what the child runs. See ``core/child.py``.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from minigpt_cli.core import child
from minigpt_cli.data import templates

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_MODULE = "minigpt_cli.data.untrusted"
_MEMORY_PER_BYTE = {"load": 30, "encode": 400}  # an encoding takes up to 200 times its text
_KEPT = 4  # tokenizers in the child; a large one takes 100 MB


def start_early() -> None:
    """Start the child now, so that it is ready when the first template or tokenizer is."""
    child.start_child(_MODULE)


def ask_child(what: str, function: str, **arguments: Any) -> Any:
    """Return the result of one of the functions below, computed in the child.

    Args:
        what: The file that is tried, for messages.
        function: Its name, without the underscore.
        arguments: JSON values.

    Raises:
        UserError: It failed, or took too much time or memory.
    """
    return child.ask(_MODULE, {"do": function, **arguments}, what)


@dataclass(frozen=True)
class Encoded:
    """The token ids of a text."""

    ids: list[int]


@dataclass(frozen=True)
class ConfinedTokenizer:
    """A tokenizer that encodes and decodes in the child; all else is that of ``inner``.

    Attributes:
        inner: The tokenizer itself. Its normalizer, patterns and decoder are never run.
        text: Its tokenizer.json.
        sha256: The sha256 (hex) of that text, its name in the child.
        what: Its file, for messages.
        encode_special_tokens: Whether special tokens in a text are encoded as text.
    """

    inner: "Tokenizer"
    text: str
    sha256: str
    what: str
    encode_special_tokens: bool = True

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):  # copy and pickle ask before it is there
            raise AttributeError(name)
        return getattr(self.inner, name)

    def encode(self, text: str, add_special_tokens: bool = True) -> Encoded:
        return self.encode_batch_fast([text], add_special_tokens)[0]

    def encode_batch_fast(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[Encoded]:
        found = self._ask(
            "encode",
            texts=list(texts),
            add_special_tokens=add_special_tokens,
            encode_special_tokens=self.encode_special_tokens,
        )
        return [Encoded(ids) for ids in found]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self._ask("decode", ids=list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def _ask(self, function: str, **arguments: Any) -> Any:
        request = {"do": function, "sha256": self.sha256, **arguments}
        return child.ask(_MODULE, request, self.what, _load_request(self.sha256, self.text))


def confined(text: str, what: str) -> ConfinedTokenizer:
    """Load a tokenizer in the child and, if that succeeds, here.

    Args:
        text: Its tokenizer.json.
        what: Its file, for messages.

    Raises:
        UserError: It is no tokenizer, or takes too much time or memory.
    """
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    child.ask(_MODULE, _load_request(sha256, text), what)
    return ConfinedTokenizer(_from_json(text), text, sha256, what)


def _load_request(sha256: str, text: str) -> dict[str, Any]:
    return {"do": "load", "sha256": sha256, "text": text}


def _from_json(text: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


# --- in the child ---------------------------------------------------------------------------------

_tokenizers: dict[str, "Tokenizer"] = {}  # by sha256, the one used last at the end


def _check_template(template: str) -> None:
    templates.compile_template(template)


def _render(now: str, **arguments: Any) -> str:
    return templates.render_template(now=datetime.fromisoformat(now), **arguments)


def _parts(now: str, **arguments: Any) -> list[tuple[str, bool]]:
    return templates.template_parts(now=datetime.fromisoformat(now), **arguments)


def _load(sha256: str, text: str) -> None:
    is_known = sha256 in _tokenizers
    _tokenizers[sha256] = _tokenizers.pop(sha256) if is_known else _from_json(text)
    while len(_tokenizers) > _KEPT:
        del _tokenizers[next(iter(_tokenizers))]


def _loaded(sha256: str) -> "Tokenizer":
    """Return a tokenizer, which becomes the last one to be dropped."""
    if sha256 not in _tokenizers:
        raise child.NotLoaded
    _tokenizers[sha256] = _tokenizers.pop(sha256)
    return _tokenizers[sha256]


def _encode(
    sha256: str, texts: list[str], add_special_tokens: bool, encode_special_tokens: bool
) -> list[list[int]]:
    tokenizer = _loaded(sha256)
    tokenizer.encode_special_tokens = encode_special_tokens
    found = tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in found]


def _decode(sha256: str, ids: list[int], skip_special_tokens: bool) -> str:
    return _loaded(sha256).decode(ids, skip_special_tokens=skip_special_tokens)


if __name__ == "__main__":
    child.serve(
        {
            "check_template": _check_template,
            "render": _render,
            "parts": _parts,
            "load": _load,
            "encode": _encode,
            "decode": _decode,
        },
        _MEMORY_PER_BYTE,
    )
