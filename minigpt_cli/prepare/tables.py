"""Documents from tables: Parquet files and Hugging Face datasets, one document per row."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.prepare.pieces import Bad, Piece, Pieces, Position, split_text
from minigpt_cli.prepare.sources import Source, local_folder

_ROWS = 256


def parquet(file: Path, field: str, bad: Bad, here: Position) -> Pieces:
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
        raise UserError(
            f"{file} is not a Parquet file that can be read: {first_line(error)}"
        ) from None


def huggingface(source: Source, bad: Bad, here: Position) -> Iterator[Piece]:
    name = source.path[0]
    row, batches = dataset_batches(source, here.offset)
    yield from _rows(_selected(batches, source.field, name), row, name, source.field, bad, here)


def dataset_batches(source: Source, skip: int = 0) -> tuple[int, Iterator[Any]]:
    """Return (a row's number, record batches of all columns from that row on).

    The row is at most ``skip``: those before it need not be read again.
    """
    folder = local_folder(source)
    saved = None if folder is None else _saved_split(folder, source.split)
    if saved is not None:
        return 0, _saved_batches(saved)
    return skip, _streamed_batches(source, skip)


def _streamed_batches(source: Source, skip: int) -> Iterator[Any]:
    from datasets import load_dataset

    folder, name = local_folder(source), source.path[0]
    try:
        data = load_dataset(
            str(folder or name), name=source.config, split=source.split, streaming=True
        )
        for table in data.skip(skip).with_format("arrow").iter(_ROWS):
            yield from table.to_batches()
    # `datasets` passes on whatever its file system, builder or parser raised
    except Exception as error:
        where = f"the Hugging Face dataset {name} (split {source.split})"
        hint = "" if folder else "; there is no such local directory either"
        raise UserError(f"{where} can't be read: {first_line(error)}{hint}") from None


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


def _saved_batches(folder: Path) -> Iterator[Any]:
    """Yield the record batches of a saved dataset, by plain reads: a memory map would count as our
    memory.
    """
    import pyarrow as pa

    try:
        files = json.loads((folder / "state.json").read_text())["_data_files"]
        for name in (entry["filename"] for entry in files):
            with pa.OSFile(str(folder / name)) as file, pa.ipc.open_stream(file) as batches:
                yield from batches
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{folder} is not a saved dataset that can be read: {first_line(error)}"
        ) from None


def _selected(batches: Iterable[Any], field: str, where: str) -> Iterator[Any]:
    for batch in batches:
        _check_field(batch.schema, field, where)
        yield batch.select([field])


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
                yield from split_text(text, here, after)
            here = after
        row = here.offset
    return here.bad
