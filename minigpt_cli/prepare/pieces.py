"""Pieces of documents, and where to cut a document that is too long to hold in memory.

A document of more than ``LONG_DOCUMENT`` bytes is cut into several pieces. The cut falls before a
space that is followed by a word. Byte-level tokenizers (GPT-2's pattern and its descendants) start
a token there, so the pieces give the same ids as the whole document. If the last ``SEARCHED``
bytes have no such space, the cut falls before other white space, or else between two characters.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

# While a piece is encoded it takes up to 200 times its size in memory (measured on base64 text),
# and each core encodes one piece.
LONG_DOCUMENT = 1 << 20

SEARCHED = 64 << 10
_WHITE_SPACE = b" \t\n\r\v\f"

# A function that reports text that can't be used, in one line.
OnBad = Callable[[str], None]


class Position(NamedTuple):
    """A place between two pieces, from which reading can continue.

    Attributes:
        file: Index into the source's files.
        offset: Bytes (uncompressed) into a file of text or JSON lines; rows into a Parquet file or
            a Hugging Face dataset.
        line: Lines read so far, in a file of text or JSON lines.
        inside: UTF-8 bytes of the current document that were read before.
        bad: Bad lines and rows so far.
    """

    file: int = 0
    offset: int = 0
    line: int = 0
    inside: int = 0
    bad: int = 0


# Named tuples cost a quarter of a frozen dataclass, and several are made per document.
class DocumentPiece(NamedTuple):
    """A piece of a document, or a whole one.

    Attributes:
        data: UTF-8 text, not empty.
        last: Whether the document ends here.
        after: Where reading continues after this piece.
    """

    data: bytes
    last: bool
    after: Position


def find_cut(text: bytes | bytearray, limit: int, searched: int = SEARCHED) -> int:
    """Find where to end a piece.

    Args:
        text: UTF-8 text of more than ``limit`` bytes.
        limit: The most bytes that the piece may have.
        searched: The bytes before ``limit`` that are searched for white space.

    Returns:
        The piece's length in bytes, from 1 to ``limit``: up to the last space before an ASCII word;
        else up to the last run of white space; else up to the last whole character.
    """
    assert 0 < limit < len(text), (limit, len(text))
    low = max(1, limit - searched)
    at = limit
    while (at := text.rfind(b" ", low, at)) > 0:
        if 0x20 < text[at + 1] < 0x80:
            return at
    for at in range(limit, low - 1, -1):
        if text[at] in _WHITE_SPACE and text[at - 1] not in _WHITE_SPACE:
            return at
    at = limit
    while at > max(1, limit - 4) and text[at] & 0xC0 == 0x80:  # a continuation byte
        at -= 1
    return at


def cut_document(text: bytes, here: Position, after: Position) -> Iterator[DocumentPiece]:
    """Cut a document that is in memory into pieces.

    Args:
        text: The whole document, UTF-8.
        here: The document's position. The first ``here.inside`` bytes are left out.
        after: The position of what follows the document.

    Yields:
        The pieces, none if nothing is left.
    """
    done = here.inside
    if len(text) - done <= LONG_DOCUMENT:
        if len(text) > done:
            yield DocumentPiece(text[done:] if done else text, True, after)
        return
    view = memoryview(text)
    while len(text) - done > LONG_DOCUMENT:
        # One byte more than the limit: find_cut looks at the byte after the cut.
        window = bytes(view[done : done + LONG_DOCUMENT + 1])
        end = find_cut(window, LONG_DOCUMENT)
        done += end
        yield DocumentPiece(window[:end], False, here._replace(inside=done, bad=after.bad))
    yield DocumentPiece(text[done:], True, after)
