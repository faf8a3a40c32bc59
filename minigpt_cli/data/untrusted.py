"""Render templates and use tokenizers that came with a model, in a child process with limits.

This module is both: what asks the child, and what the child runs. See ``core/child.py``.
"""

import itertools
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
_numbers = itertools.count()


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
        number: Its number in the child.
        what: Its file, for messages.
        encode_special_tokens: Whether special tokens in a text are encoded as text.
    """

    inner: "Tokenizer"
    text: str
    number: int
    what: str
    encode_special_tokens: bool = True

    def __getattr__(self, name: str) -> Any:
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
        return ask_child(self.what, function, number=self.number, **arguments)


def confined(text: str, what: str) -> ConfinedTokenizer:
    """Load a tokenizer in the child and, if that succeeds, here.

    Args:
        text: Its tokenizer.json.
        what: Its file, for messages.

    Raises:
        UserError: It is no tokenizer, or takes too much time or memory.
    """
    from tokenizers import Tokenizer

    number = next(_numbers)
    ask_child(what, "load", number=number, text=text)
    return ConfinedTokenizer(Tokenizer.from_str(text), text, number, what)


# --- in the child ---------------------------------------------------------------------------------

_tokenizers: dict[int, "Tokenizer"] = {}


def _check_template(template: str) -> None:
    templates.compile_template(template)


def _render(now: str, **arguments: Any) -> str:
    return templates.render_template(now=datetime.fromisoformat(now), **arguments)


def _parts(now: str, **arguments: Any) -> list[tuple[str, bool]]:
    return templates.template_parts(now=datetime.fromisoformat(now), **arguments)


def _load(number: int, text: str) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _tokenizers[number] = tokenizer


def _encode(
    number: int, texts: list[str], add_special_tokens: bool, encode_special_tokens: bool
) -> list[list[int]]:
    tokenizer = _tokenizers[number]
    tokenizer.encode_special_tokens = encode_special_tokens
    found = tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in found]


def _decode(number: int, ids: list[int], skip_special_tokens: bool) -> str:
    return _tokenizers[number].decode(ids, skip_special_tokens=skip_special_tokens)


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
