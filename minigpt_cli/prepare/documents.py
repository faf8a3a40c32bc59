"""Documents of a source: streamed in pieces of bounded size, from any position on."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt_cli.core.errors import UserError
from minigpt_cli.prepare.open_file import open_uncompressed, readable
from minigpt_cli.prepare.pieces import (
    LONG_DOCUMENT,
    SEARCHED,
    DocumentPiece,
    OnBad,
    Position,
    cut_document,
    find_cut,
)
from minigpt_cli.prepare.readers import (
    BYTE_ORDER_MARK,
    RawRecord,
    field_names,
    files_from,
    raw_records,
    text_problem,
)
from minigpt_cli.prepare.sources import Source
from minigpt_cli.prepare.text_check import TextCheck

if TYPE_CHECKING:
    import pyarrow as pa


_READ_AT_ONCE = 256 << 10


@dataclass
class _BadText:
    """Counts and reports text that can't be used."""

    on_bad: OnBad | None
    strict: bool
    count: int

    def report(self, message: str) -> None:
        if self.strict:
            raise UserError(f"{message.removesuffix('; skipped')} (refused: strict)")
        self.count += 1
        if self.on_bad is not None:
            self.on_bad(message)


def documents(
    source: Source,
    strict: bool = False,
    on_bad: OnBad | None = None,
    start: Position | None = None,
) -> Iterator[DocumentPiece]:
    """Read the documents of a source, in an order that depends on the source alone.

    Empty documents are left out. So is bad text, which is reported and counted in ``Position.bad``:
    a malformed line of JSON, an empty cell of a table, a line of text or a standard library file
    that isn't UTF-8. Memory is bounded, whatever the size of the files: of a line of text that is
    longer than a piece, only the pieces with invalid bytes are left out.

    Args:
        source: What to read.
        strict: Refuse bad text.
        on_bad: Called with one line for each bad text, with its file and line.
        start: Where to continue: the ``after`` of an earlier piece.

    Yields:
        The documents, in pieces of about ``LONG_DOCUMENT`` bytes at most.

    Raises:
        UserError: A file can't be read or isn't text (see ``text_check.py``), a field is missing,
            or a text is bad and ``strict`` is set.
    """
    start = start or Position()
    bad = _BadText(on_bad, strict, start.bad)
    if source.kind not in ("files", "python-stdlib"):
        yield from _from_records(source, bad, start)
        return
    read = _text_file if source.kind == "files" else _python_file
    for file, here in files_from(source, start):
        with readable(file):
            yield from read(file, bad, here._replace(bad=bad.count))


def _from_records(source: Source, bad: _BadText, start: Position) -> Iterator[DocumentPiece]:
    """Read one document per record."""

    def text_column(schema: "pa.Schema", table: str) -> list[str]:
        return _text_column(schema, table, source.field)

    for record in raw_records(source, text_column, start, text_as_bytes=True):
        text = _text_of(record, source.field)
        if isinstance(text, str):
            # With `inside` set, this record was good when it was first read.
            bad.report(f"{record.where}: {text}; skipped")
        elif text:
            after = record.after
            if bad.count != after.bad:
                after = after._replace(bad=bad.count)
            yield from cut_document(text, record.here, after)


def _text_column(schema: "pa.Schema", table: str, field: str) -> list[str]:
    import pyarrow as pa

    if field not in schema.names:
        raise UserError(f"{table} has no field {field!r}; it has {', '.join(schema.names)}")
    kind = schema.field(field).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise UserError(f"field {field!r} of {table} holds {kind}, not text")
    return [field]


def _text_of(record: RawRecord, field: str) -> bytes | str:
    """Return the record's text in UTF-8, or a string that says what is wrong."""
    content = record.content
    if isinstance(content, str):
        return content
    if field not in content:
        return f"no field {field!r} (fields: {field_names(content)})"
    text = content[field]
    if text is None:
        return f"no text in field {field!r}"
    if isinstance(text, bytes):  # from a table, which Arrow reads unchecked
        with contextlib.suppress(UnicodeDecodeError):
            text.decode()
            return text
        return f"field {field!r} is not valid UTF-8"
    if isinstance(text, str):
        with contextlib.suppress(UnicodeEncodeError):
            return text.encode()
    return f"field {field!r} {text_problem(text)}"


def _text_file(file: Path, bad: _BadText, here: Position) -> Iterator[DocumentPiece]:
    """Read a file as one document, at most a piece at a time, without its invalid lines."""
    check = TextCheck(file, whole=here.offset == 0)
    ready: DocumentPiece | None = None  # held back: it may be the last one
    with open_uncompressed(file, here.offset) as stream:
        buffer = bytearray()
        at_end = False
        last = False
        while not last:
            # More than a piece, to see the end of the line that its end cuts.
            while not at_end and len(buffer) <= LONG_DOCUMENT + SEARCHED:
                chunk = stream.read(_READ_AT_ONCE)
                check.read(chunk)
                buffer += chunk
                at_end = not chunk
            last = len(buffer) <= LONG_DOCUMENT
            end = len(buffer) if last else find_cut(buffer, LONG_DOCUMENT)
            data = bytes(buffer[:end])
            if not (_is_utf8(data) and _line_is_utf8(buffer, end)):
                # The next piece begins with the line that would be cut. A longer line is cut.
                end = end if last else buffer.rfind(b"\n", 0, end) + 1 or end
                data = _valid_lines(bytes(buffer[:end]), check, bad, here)
            if here.offset == 0:
                data = data.removeprefix(BYTE_ORDER_MARK)
            here = Position(
                here.file,
                here.offset + end,
                here.line + buffer.count(b"\n", 0, end),
                here.inside + len(data),
                bad.count,
            )
            del buffer[:end]
            if data:
                if ready is not None:
                    yield ready
                ready = DocumentPiece(data, False, here)
    check.finish()
    if ready is not None:
        yield ready._replace(last=True, after=Position(file=here.file + 1, bad=bad.count))


def _is_utf8(data: bytes, ends: bool = True) -> bool:
    """Return whether bytes are UTF-8; if they go on after their end, a character may too."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return not ends and error.reason == "unexpected end of data"
    return True


def _line_is_utf8(buffer: bytearray, start: int) -> bool:
    """Return whether the rest of the line at ``start`` is UTF-8, as far as it is in the buffer."""
    end = buffer.find(b"\n", start) + 1
    return _is_utf8(bytes(buffer[start : end or len(buffer)]), ends=end > 0)


def _valid_lines(data: bytes, check: TextCheck, bad: _BadText, here: Position) -> bytes:
    """Leave out the lines that aren't UTF-8, and report them."""
    kept = []
    for number, line in enumerate(io.BytesIO(data), here.line + 1):
        try:
            line.decode()
            kept.append(line)
        except UnicodeDecodeError as error:
            check.bad(line)
            bad.report(f"{check.file}:{number}: not valid UTF-8 at byte {error.start}; skipped")
    return b"".join(kept)


def _python_file(file: Path, bad: _BadText, here: Position) -> Iterator[DocumentPiece]:
    """Read a module of the standard library as one document."""
    try:
        text = file.read_bytes()
        text.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = "not valid UTF-8" if isinstance(error, ValueError) else error.strerror
        bad.report(f"{file}: {reason}; skipped")
    else:
        yield from cut_document(text, here, Position(file=here.file + 1, bad=here.bad))
