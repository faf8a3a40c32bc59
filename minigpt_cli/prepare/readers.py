"""Read the raw records of JSON lines, Parquet files and Hugging Face datasets.

``documents.py`` takes a text from each record; ``instruction_records.py`` a prompt and its
completion, or a conversation. One line, or a few hundred rows of a table, are in memory at a time.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.core.reading import build, read_json
from minigpt_cli.data.dataset_manifest import check_bare_name
from minigpt_cli.prepare.open_file import SKIPPED_AT_ONCE, open_uncompressed, readable
from minigpt_cli.prepare.pieces import Position
from minigpt_cli.prepare.sources import Source, check_regular, local_folder, source_files
from minigpt_cli.prepare.text_check import TextCheck

if TYPE_CHECKING:
    import pyarrow as pa

# A line of JSON is read into memory as a whole. A longer line counts as bad.
MAX_LINE = 256 << 20

BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_ROWS = 256  # of a table, converted at a time

# Takes a table's schema and name; returns the columns to read, or raises UserError.
ChooseColumns = Callable[["pa.Schema", str], list[str]]


class RawRecord(NamedTuple):
    """One record of a source.

    Attributes:
        content: The record's fields by name, or one line that says why it can't be read.
        name: The file or the Hugging Face dataset that holds it.
        here: The record's position.
        after: The next record's position. Its ``bad`` doesn't count this reader's bad records.
    """

    content: dict[str, Any] | str
    name: str
    here: Position
    after: Position

    @property
    def where(self) -> str:
        """The record's place, for messages: ``file:line`` or ``table: row 5``."""
        if self.after.line:  # only JSON lines have line numbers
            return f"{self.name}:{self.after.line}"
        return f"{self.name}: row {self.here.offset}"


def raw_records(
    source: Source,
    choose_columns: ChooseColumns,
    start: Position | None = None,
    text_as_bytes: bool = False,
) -> Iterator[RawRecord]:
    """Read the records of a source of kind jsonl, parquet or huggingface, in the source's order.

    Args:
        source: What to read.
        choose_columns: Checks the schema of a table and chooses the columns to read.
        start: Where to start; the beginning by default.
        text_as_bytes: Give texts from tables as UTF-8 bytes. Arrow stores them so, and no string
            is made of them. One column is chosen then.

    Raises:
        UserError: A file can't be read, or isn't of the kind that the source says.
    """
    start = start or Position()
    if source.kind == "huggingface":
        name = source.path[0]
        row, batches = _dataset_batches(source, start.offset)
        chosen = (batch.select(choose_columns(batch.schema, name)) for batch in batches)
        yield from _rows(chosen, row, name, start, text_as_bytes)
        return
    for file, here in files_from(source, start):
        with readable(file):
            if source.kind == "jsonl":
                yield from _json_lines(file, here)
            else:
                yield from _parquet(file, choose_columns, here, text_as_bytes)


def files_from(source: Source, start: Position) -> Iterator[tuple[Path, Position]]:
    """Give the source's files from ``start`` on, each with the position to start at in it."""
    for index, file in enumerate(source_files(source)):
        if index >= start.file:
            yield file, start if index == start.file else Position(file=index, bad=start.bad)


def field_names(record: dict[str, Any]) -> str:
    """List a record's first field names, for messages."""
    return ", ".join(sorted(map(repr, record))[:8]) or "none"


def text_problem(value: Any) -> str | None:
    """Check that a value is text that UTF-8 can hold.

    Returns:
        What is wrong, as the end of a sentence about the value; None if nothing is.
    """
    if not isinstance(value, str):
        return f"is not a string but {type(value).__name__}"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is not Unicode text"
    return None


def _json_lines(file: Path, here: Position) -> Iterator[RawRecord]:
    name = str(file)
    check = TextCheck(file, whole=here.offset == 0)
    with open_uncompressed(file, here.offset) as stream:
        while line := stream.readline(MAX_LINE):
            check.read(line)
            after = Position(here.file, here.offset + len(line), here.line + 1, 0, here.bad)
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                line = b""
                while rest := stream.readline(SKIPPED_AT_ONCE):
                    check.read(rest)
                    after = after._replace(offset=after.offset + len(rest))
                    if rest.endswith(b"\n"):
                        break
                yield RawRecord(f"longer than {MAX_LINE >> 20} MiB", name, here, after)
            else:
                if here.offset == 0:
                    line = line.removeprefix(BYTE_ORDER_MARK)
                    if line.lstrip().startswith(b"["):
                        raise UserError(
                            f"{file} begins with '[': it is a JSON array, not JSON lines; "
                            "write one object per line"
                        )
                if line.strip():
                    yield RawRecord(_parse(line, check), name, here, after)
            here = after
    check.finish()


def _parse(line: bytes, check: TextCheck) -> dict[str, Any] | str:
    """Return the object on a line of JSON, or what is wrong with the line."""
    try:
        record = json.loads(line.decode())
    except RecursionError:
        return "JSON nested too deeply"
    except UnicodeDecodeError as error:
        check.bad(line)
        return f"not valid UTF-8 at byte {error.start} of the line"
    except ValueError as error:
        return f"not valid JSON ({error})"
    return record if isinstance(record, dict) else f"not a JSON object but {type(record).__name__}"


def _parquet(
    file: Path, choose_columns: ChooseColumns, here: Position, text_as_bytes: bool
) -> Iterator[RawRecord]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            columns = choose_columns(table.schema_arrow, str(file))
            groups: list[int] = []
            row = 0  # of the first group that is read; earlier groups are skipped
            for index in range(table.num_row_groups):
                rows = table.metadata.row_group(index).num_rows
                if groups or row + rows > here.offset:
                    groups.append(index)
                else:
                    row += rows
            batches = table.iter_batches(_ROWS, row_groups=groups, columns=columns)
            yield from _rows(batches, row, str(file), here, text_as_bytes)
    except (pa.ArrowException, UnicodeDecodeError) as error:  # the latter for a column's name
        raise UserError(
            f"{file} is not a Parquet file that can be read: {first_line(error)}"
        ) from None


def _rows(
    batches: Iterator["pa.RecordBatch"], row: int, name: str, here: Position, text_as_bytes: bool
) -> Iterator[RawRecord]:
    """Give the rows of record batches, from ``here`` on. The first batch starts at ``row``."""
    for batch in batches:
        if row + len(batch) <= here.offset:  # read before
            row += len(batch)
            continue
        batch = batch.slice(here.offset - row)
        if text_as_bytes:
            contents = _texts_as_bytes(batch)
        else:
            contents = batch.to_pylist()
        for content in contents:
            after = Position(here.file, here.offset + 1, 0, 0, here.bad)
            yield RawRecord(content, name, here, after)
            here = after
        row = here.offset


def _texts_as_bytes(batch: "pa.RecordBatch") -> list[dict[str, bytes | None]]:
    """Convert a batch with a single column of text."""
    (name,) = batch.schema.names
    return [{name: text} for text in batch.column(0).cast("large_binary").to_pylist()]


def _dataset_batches(source: Source, skip: int) -> tuple[int, Iterator["pa.RecordBatch"]]:
    """Return a row's number, at most ``skip``, and the record batches from that row on."""
    folder = local_folder(source)
    saved = None if folder is None else _saved_split(folder, source.split)
    if saved is not None:
        return 0, _saved_batches(saved)
    return skip, _streamed_batches(source, skip)


def _streamed_batches(source: Source, skip: int) -> Iterator["pa.RecordBatch"]:
    from datasets import load_dataset

    folder, name = local_folder(source), source.path[0]
    try:
        data = load_dataset(
            str(folder or name), name=source.config, split=source.split, streaming=True
        )
        for table in data.skip(skip).with_format("arrow").iter(_ROWS):
            yield from table.to_batches()
    # The library lets through what its file system, builder or parser raised.
    except Exception as error:
        where = f"the Hugging Face dataset {name} (split {source.split})"
        hint = "" if folder else "; there is no local directory of this name either"
        raise UserError(f"{where} can't be read: {first_line(error)}{hint}") from None


def _saved_split(folder: Path, split: str) -> Path | None:
    """Find the directory of one split that ``save_to_disk`` wrote, None if it wrote none here."""
    file = folder / "dataset_dict.json"
    if file.is_file():
        splits = _entry(file, "splits", tuple[str, ...])
        if split not in splits:
            raise UserError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
        folder = folder / _bare_name(split, folder)
    return folder if (folder / "state.json").is_file() else None


def _saved_batches(folder: Path) -> Iterator["pa.RecordBatch"]:
    """Read the record batches of a saved dataset; a memory map would count as our memory."""
    import pyarrow as pa

    files = _entry(folder / "state.json", "_data_files", tuple[dict[str, Any], ...])
    for file in [folder / _bare_name(entry.get("filename"), folder) for entry in files]:
        try:
            check_regular(file)
            with pa.OSFile(str(file)) as stream, pa.ipc.open_stream(stream) as batches:
                yield from batches
        except (pa.ArrowException, OSError) as error:
            raise _not_readable(folder, first_line(error)) from None


def _entry(file: Path, name: str, kind: Any) -> Any:
    """Return an entry of a JSON file that ``save_to_disk`` wrote."""
    try:
        return build(kind, read_json(file)[name], name)
    except UserError as error:
        raise _not_readable(file.parent, str(error)) from None
    except KeyError:
        raise _not_readable(file.parent, f"{file.name} has no {name}") from None
    except ValueError as error:
        raise _not_readable(file.parent, f"{file.name}: {error}") from None


def _bare_name(name: Any, folder: Path) -> str:
    try:
        check_bare_name(build(str, name, "a name"))
    except ValueError as error:
        raise _not_readable(folder, str(error)) from None
    return str(name)


def _not_readable(folder: Path, reason: str) -> UserError:
    return UserError(f"{folder} is not a saved dataset that can be read: {reason}")
