"""Pieces of documents, and where a document too long to be in memory as a whole is cut.

A document of more than ``LONG_DOCUMENT`` bytes comes as several pieces. They are cut just before a
space that a word follows, where byte-level tokenizers (GPT-2's pattern and its descendants) start a
token anyway, so that encoding the pieces gives the ids of the whole. Without such a space in the
last ``_REACH`` bytes the cut falls before other white space, and without any at a character's
boundary.
"""

from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

# One piece's encoding takes up to 200 times its size in memory while it lasts (base64, measured),
# and one piece is in work per core.
LONG_DOCUMENT = 1 << 20

_REACH = 64 << 10
_WHITE = b" \t\n\r\v\f"


class Position(NamedTuple):
    """A place between two pieces, from which reading goes on. Plain JSON values.

    ``file``: index into the source's files. ``offset``: bytes (unpacked) into a file of text or
    JSON lines; rows into a Parquet file or a Hugging Face dataset. ``line``: lines read so far
    (JSON lines); 1 once the current text file has been counted as bad. ``inside``: UTF-8 bytes of
    the current document that were already yielded. ``bad``: bad lines or files so far.
    """

    file: int = 0
    offset: int = 0
    line: int = 0
    inside: int = 0
    bad: int = 0


# Named tuples rather than frozen dataclasses: two are made per document, and they cost a quarter.
class Piece(NamedTuple):
    """``data``: UTF-8 text, not empty. ``last``: the document ends here. ``after``: where reading
    goes on.
    """

    data: bytes
    last: bool
    after: Position


def cut(text: bytes | bytearray, limit: int) -> int:
    """Return where to end a piece: at most ``limit`` bytes, at least 1; ``text`` is longer than
    ``limit``.

    The last space within reach that an ASCII word follows; else the last white space that begins a
    run of it; else the last character's boundary.
    """
    assert 0 < limit < len(text), (limit, len(text))
    low = max(1, limit - _REACH)
    at = limit
    while (at := text.rfind(b" ", low, at)) > 0:
        if 0x20 < text[at + 1] < 0x80:
            return at
    for at in range(limit, low - 1, -1):
        if text[at] in _WHITE and text[at - 1] not in _WHITE:
            return at
    at = limit
    while at > max(1, limit - 4) and text[at] & 0xC0 == 0x80:  # a continuation byte
        at -= 1
    return at


# What a reader calls with a line about text that it can't use.
Bad = Callable[[str], None]
# A reader of one file; it returns the number of bad lines and files so far.
Pieces = Generator[Piece, None, int]


def split_text(text: bytes, here: Position, after: Position) -> Iterator[Piece]:
    """Yield a document that is in memory, from ``here.inside`` on."""
    done = here.inside
    if len(text) - done <= LONG_DOCUMENT:
        if len(text) > done:
            yield Piece(text[done:] if done else text, True, after)
        return
    view = memoryview(text)
    while len(text) - done > LONG_DOCUMENT:
        # The window is one byte longer than the limit: `cut` looks at the byte after.
        window = bytes(view[done : done + LONG_DOCUMENT + 1])
        end = cut(window, LONG_DOCUMENT)
        done += end
        yield Piece(window[:end], False, here._replace(inside=done, bad=after.bad))
    yield Piece(text[done:], True, after)
