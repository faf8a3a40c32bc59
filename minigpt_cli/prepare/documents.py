"""Documents of a source: streamed in pieces of bounded size, from any position on."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt_cli.core.errors import UserError
from minigpt_cli.prepare.pieces import (
    LONG_DOCUMENT,
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
    open_uncompressed,
    raw_records,
    readable,
    text_problem,
)
from minigpt_cli.prepare.sources import Source

if TYPE_CHECKING:
    import pyarrow as pa


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

    Empty documents are left out. Bad text is reported and counted in ``Position.bad``: a malformed
    line of JSON, an empty cell of a table, or a standard library file that isn't UTF-8 is skipped;
    invalid bytes in a text file become U+FFFD. Memory is bounded, whatever the size of the files.

    Args:
        source: What to read.
        strict: Refuse bad text.
        on_bad: Called with one line for each bad text, with its file and line.
        start: Where to continue: the ``after`` of an earlier piece.

    Yields:
        The documents, in pieces of about ``LONG_DOCUMENT`` bytes at most.

    Raises:
        UserError: A file can't be read, a field is missing, or a text is bad and ``strict`` is set.
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
    if isinstance(text, bytes):  # from a table
        return text
    if isinstance(text, str):
        with contextlib.suppress(UnicodeEncodeError):
            return text.encode()
    return f"field {field!r} {text_problem(text)}"


def _text_file(file: Path, bad: _BadText, here: Position) -> Iterator[DocumentPiece]:
    """Read a file as one document, at most a piece at a time."""
    with open_uncompressed(file, here.offset) as stream:
        buffer = bytearray()
        at_end = False
        while True:
            while not at_end and len(buffer) <= LONG_DOCUMENT:
                chunk = stream.read(LONG_DOCUMENT + 1 - len(buffer))
                buffer += chunk
                at_end = not chunk
            last = len(buffer) <= LONG_DOCUMENT
            end = len(buffer) if last else find_cut(buffer, LONG_DOCUMENT)
            data = bytes(buffer[:end])
            del buffer[:end]
            if here.offset == 0:
                data = data.removeprefix(BYTE_ORDER_MARK)
            try:
                data.decode()
            except UnicodeDecodeError as error:
                if not here.line:  # a file is counted once
                    bad.report(f"{file}: not valid UTF-8 at byte {here.offset + error.start}")
                    here = here._replace(line=1, bad=bad.count)
                data = data.decode(errors="replace").encode()
            here = here._replace(offset=here.offset + end, inside=here.inside + len(data))
            if last:
                if data:
                    yield DocumentPiece(data, True, Position(file=here.file + 1, bad=here.bad))
                return
            yield DocumentPiece(data, False, here)


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
