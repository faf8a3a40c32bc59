"""Documents of a source, streamed in pieces of bounded size, from any position on."""

import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from minigpt_cli.core.errors import UserError
from minigpt_cli.prepare.pieces import LONG_DOCUMENT, Bad, Piece, Pieces, Position, cut, split_text
from minigpt_cli.prepare.sources import Source, source_files
from minigpt_cli.prepare.tables import huggingface, parquet

# A line of JSON must be in memory as a whole to be read; a longer one counts as malformed.
MAX_LINE = 256 << 20


def documents(
    source: Source,
    strict: bool = False,
    on_bad: Callable[[str], None] | None = None,
    start: Position | None = None,
) -> Iterator[Piece]:
    """Yield the source's documents, in an order that depends on the source alone.

    Empty documents are passed over. What can't be read as text is counted in ``Position.bad`` and
    told to ``on_bad`` in one line with file and line: a malformed line of JSON lines, a null in
    Parquet or a standard library file in another encoding is skipped; in a plain text file invalid
    bytes become U+FFFD. With ``strict`` each of these raises ``UserError`` instead. Memory stays
    bounded whatever the size of files and of text documents. ``start`` is the ``after`` of an
    earlier piece.

    Raises ``UserError`` for files that can't be read and for a missing field, naming those there
    are.
    """

    def bad(message: str) -> None:
        if strict:
            raise UserError(f"{message.removesuffix('; skipped')} (refused: strict)")
        if on_bad is not None:
            on_bad(message)

    start = start or Position()
    if source.kind == "huggingface":
        yield from huggingface(source, bad, start)
        return
    read = {
        "files": _text_file,
        "jsonl": _json_lines,
        "parquet": parquet,
        "python-stdlib": _python_file,
    }[source.kind]
    for index, file in enumerate(source_files(source)):
        if index < start.file:
            continue
        here = start if index == start.file else Position(file=index, bad=start.bad)
        try:
            # Each reader returns the number of bad lines so far, which the next file starts from.
            start = start._replace(bad=(yield from read(file, source.field, bad, here)))
        except (OSError, EOFError, zlib.error) as error:  # the last two from torn .gz files
            reason = error.strerror if isinstance(error, OSError) else None
            raise UserError(f"{file} can't be read: {reason or error}") from None


def _text_file(file: Path, field: str, bad: Bad, here: Position) -> Pieces:
    """One document: the whole file, never in memory as a whole."""
    with opened(file) as stream:
        _skip(stream, here.offset)
        buffer = bytearray()
        done = False
        while True:
            while not done and len(buffer) <= LONG_DOCUMENT:
                chunk = stream.read(LONG_DOCUMENT + 1 - len(buffer))
                buffer += chunk
                done = not chunk
            if done and not buffer:
                return here.bad
            last = done and len(buffer) <= LONG_DOCUMENT
            end = len(buffer) if last else cut(buffer, LONG_DOCUMENT)
            data = bytes(buffer[:end])
            del buffer[:end]
            if here.offset == 0:
                data = data.removeprefix(b"\xef\xbb\xbf")  # a byte order mark isn't text
            try:
                data.decode()
            except UnicodeDecodeError as error:
                if not here.line:  # each file is counted once
                    bad(f"{file}: not valid UTF-8 at byte {here.offset + error.start}")
                    here = here._replace(line=1, bad=here.bad + 1)
                data = data.decode(errors="replace").encode()
            here = here._replace(offset=here.offset + end, inside=here.inside + len(data))
            if last:
                after = Position(file=here.file + 1, bad=here.bad)
                if data:
                    yield Piece(data, True, after)
                return here.bad
            yield Piece(data, False, here)


def _python_file(file: Path, field: str, bad: Bad, here: Position) -> Pieces:
    """One document: a module of the standard library; skipped when it can't be read as UTF-8."""
    after = Position(file=here.file + 1, bad=here.bad)
    try:
        text = file.read_bytes()
        text.decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = "not valid UTF-8" if isinstance(error, ValueError) else error.strerror
        bad(f"{file}: {reason}; skipped")
        return here.bad + 1
    yield from split_text(text, here, after)
    return here.bad


def _json_lines(file: Path, field: str, bad: Bad, here: Position) -> Pieces:
    """One document per line."""
    with opened(file) as stream:
        _skip(stream, here.offset)
        while line := stream.readline(MAX_LINE):
            after = here._replace(offset=here.offset + len(line), line=here.line + 1, inside=0)
            reason = None
            text = b""
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while rest := stream.readline(MAX_LINE):
                    after = after._replace(offset=after.offset + len(rest))
                    if rest.endswith(b"\n"):
                        break
                reason = f"longer than {MAX_LINE >> 20} MiB"
            else:
                if here.offset == 0:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                    if line.lstrip().startswith(b"["):
                        raise UserError(
                            f"{file} begins with '[': it is a JSON array, not JSON lines; "
                            "write one object per line"
                        )
                if line.strip():
                    text, reason = _text_of(line, field)
            if reason is not None:
                # `inside` means that this line was good when it was read first
                bad(f"{file}:{after.line}: {reason}; skipped")
                after = after._replace(bad=after.bad + 1)
            elif text:
                yield from split_text(text, here, after)
            here = after
    return here.bad


def _text_of(line: bytes, field: str) -> tuple[bytes, str | None]:
    """Return (the text of one JSON line, None) or (nothing, what is wrong with the line)."""
    try:
        record = json.loads(line.decode())
        if not isinstance(record, dict):
            return b"", f"not a JSON object but {type(record).__name__}"
        if field not in record:
            names = ", ".join(sorted(record)[:8]) or "none"
            return b"", f"no field {field!r} (fields: {names})"
        if not isinstance(record[field], str):
            return b"", f"field {field!r} is not a string but {type(record[field]).__name__}"
        return record[field].encode(), None
    except UnicodeDecodeError as error:
        return b"", f"not valid UTF-8 at byte {error.start} of the line"
    except UnicodeEncodeError:
        return b"", f"field {field!r} holds half of a surrogate pair, which is not Unicode text"
    except RecursionError:
        return b"", "JSON nested too deeply"
    except ValueError as error:
        return b"", f"not valid JSON ({error})"


def opened(file: Path) -> BinaryIO:
    """Open a file to read its bytes, those of .gz and .zst unpacked."""
    if file.suffix == ".gz":
        import gzip

        return cast(BinaryIO, gzip.open(file))
    if file.suffix == ".zst":
        import pyarrow as pa

        return cast(BinaryIO, io.BufferedReader(pa.input_stream(str(file), compression="zstd")))
    return file.open("rb")


def _skip(stream: BinaryIO, offset: int) -> None:
    if isinstance(stream, io.BufferedReader) and stream.seekable():
        stream.seek(offset)
        return
    while offset > 0:  # a compressed stream can only be read through
        offset -= len(stream.read(min(offset, LONG_DOCUMENT))) or offset
