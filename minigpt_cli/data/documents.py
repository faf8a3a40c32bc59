"""Documents of a source, streamed in pieces of bounded size, from any position on.

A document of more than ``LONG_DOCUMENT`` bytes comes as several pieces. They are cut just before a
space that a word follows, where byte-level tokenizers (GPT-2's pattern and its descendants) start a
token anyway, so that encoding the pieces gives the ids of the whole. Without such a space in the
last ``_REACH`` bytes the cut falls before other white space, and without any at a character's
boundary.
"""

import io
import json
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from minigpt_cli.data.sources import Source, local_folder, source_files
from minigpt_cli.errors import UserError

# One piece's encoding takes up to 200 times its size in memory while it lasts (base64, measured),
# and one piece is in work per core.
LONG_DOCUMENT = 1 << 20

# A line of JSON must be in memory as a whole to be read; a longer one counts as malformed.
MAX_LINE = 256 << 20

_REACH = 64 << 10
_WHITE = b" \t\n\r\v\f"
_ROWS = 256


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
            raise UserError(f"{message} (strict: nothing may be skipped)")
        if on_bad is not None:
            on_bad(message)

    start = start or Position()
    try:
        if source.kind == "huggingface":
            yield from _huggingface(source, bad, start)
            return
        read = {
            "files": _text_file,
            "jsonl": _json_lines,
            "parquet": _parquet,
            "python-stdlib": _python_file,
        }[source.kind]
        for index, file in enumerate(source_files(source)):
            if index < start.file:
                continue
            here = start if index == start.file else Position(file=index, bad=start.bad)
            # Each reader returns the number of bad lines so far, which the next file starts from.
            count = yield from read(file, source.field, bad, here)
            start = start._replace(bad=count)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"the source can't be read: {where}{error.strerror or error}") from None


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


Bad = Callable[[str], None]
Pieces = Generator[Piece, None, int]  # returns the number of bad lines and files so far


def _split(text: bytes, here: Position, after: Position) -> Iterator[Piece]:
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


def _text_file(file: Path, field: str, bad: Bad, here: Position) -> Pieces:
    """One document: the whole file, never in memory as a whole."""
    with _opened(file) as stream:
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
    yield from _split(text, here, after)
    return here.bad


def _json_lines(file: Path, field: str, bad: Bad, here: Position) -> Pieces:
    """One document per line."""
    with _opened(file) as stream:
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
                yield from _split(text, here, after)
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


def _parquet(file: Path, field: str, bad: Bad, here: Position) -> Pieces:
    """One document per row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            _check_field(table.schema_arrow, field, str(file))
            groups: list[int] = []
            row = 0  # of the first group that is read: those before `here` are not
            for index in range(table.num_row_groups):
                rows = table.metadata.row_group(index).num_rows
                if groups or row + rows > here.offset:
                    groups.append(index)
                else:
                    row += rows
            batches = table.iter_batches(_ROWS, row_groups=groups, columns=[field])
            return (yield from _rows(batches, row, str(file), field, bad, here))
    except pa.ArrowException as error:
        raise UserError(f"{file} is not a Parquet file that can be read: {_line(error)}") from None


def _huggingface(source: Source, bad: Bad, here: Position) -> Iterator[Piece]:
    folder = local_folder(source)
    name = source.path[0]
    if folder is not None:
        saved = _saved_split(folder, source.split)
        if saved is not None:
            yield from _rows(_arrow_batches(saved, source.field), 0, name, source.field, bad, here)
            return
    from datasets import load_dataset

    try:
        data = load_dataset(
            str(folder or name), name=source.config, split=source.split, streaming=True
        )
        batches = (
            batch
            for table in data.skip(here.offset).with_format("arrow").iter(_ROWS)
            for batch in _checked(table, source.field, name).to_batches()
        )
        yield from _rows(batches, here.offset, name, source.field, bad, here)
    except UserError:
        raise
    except (
        Exception
    ) as error:  # `datasets` raises whatever its file system, builder or parser raised
        raise UserError(
            f"the Hugging Face dataset {name} (split {source.split}) can't be read: {_line(error)}"
        ) from None


def _saved_split(folder: Path, split: str) -> Path | None:
    """Return the directory of one split that `save_to_disk` wrote; None for another kind of
    directory.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if split not in splits:
            raise UserError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
        folder = folder / split
    return folder if (folder / "state.json").is_file() else None


def _arrow_batches(folder: Path, field: str) -> Iterator[Any]:
    """Yield the record batches of a saved dataset, by plain reads: a memory map would count as our
    memory.
    """
    import pyarrow as pa

    try:
        files = json.loads((folder / "state.json").read_text())["_data_files"]
        for name in (entry["filename"] for entry in files):
            with pa.OSFile(str(folder / name)) as file, pa.ipc.open_stream(file) as batches:
                _check_field(batches.schema, field, str(folder / name))
                for batch in batches:
                    yield batch.select([field])
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise UserError(
            f"{folder} is not a saved dataset that can be read: {_line(error)}"
        ) from None


def _checked(table: Any, field: str, where: str) -> Any:
    _check_field(table.schema, field, where)
    return table.select([field])


def _check_field(schema: Any, field: str, where: str) -> None:
    import pyarrow as pa

    if field not in schema.names:
        raise UserError(f"{where} has no field {field!r}; it has {', '.join(schema.names)}")
    kind = schema.field(field).type
    if not any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string)):
        raise UserError(f"field {field!r} of {where} holds {kind}, not text")


def _rows(
    batches: Iterator[Any], row: int, where: str, field: str, bad: Bad, here: Position
) -> Pieces:
    """Yield the rows of one-column record batches whose first row has number ``row``."""
    for batch in batches:
        if row + len(batch) <= here.offset:  # read before; not converted again
            row += len(batch)
            continue
        # Bytes, not strings: Arrow's text is UTF-8 already
        for text in (
            batch.column(0).cast("large_binary").slice(max(0, here.offset - row)).to_pylist()
        ):
            after = here._replace(offset=here.offset + 1, inside=0)
            if text is None:
                bad(f"{where}: row {here.offset}: no text in field {field!r}; skipped")
                after = after._replace(bad=after.bad + 1)
            elif text:
                yield from _split(text, here, after)
            here = after
        row = here.offset
    return here.bad


def _opened(file: Path) -> BinaryIO:
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


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
