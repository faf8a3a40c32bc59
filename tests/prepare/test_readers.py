"""Raw records: the same ones from every kind of source, from any position on."""

import gzip
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minigpt_cli.core.errors import UserError
from minigpt_cli.prepare import readers
from minigpt_cli.prepare.readers import raw_records
from minigpt_cli.prepare.sources import Source
from tests.helpers.documents import json_lines

if TYPE_CHECKING:
    from datasets import Dataset

RECORDS = [{"prompt": f"p{i}", "label": i, "tags": ["a"] * (i % 3)} for i in range(700)]


def all_columns(schema: pa.Schema, table: str) -> list[str]:
    return list(schema.names)


@pytest.fixture
def dataset() -> "Dataset":
    from datasets import Dataset

    return Dataset.from_list(RECORDS)


def every_source(folder: Path, dataset: "Dataset") -> list[Source]:
    """Write RECORDS in every format, in two files each."""
    for name, part in (("0", RECORDS[:400]), ("1", RECORDS[400:])):
        (folder / f"{name}.jsonl").write_text(json_lines(*part))
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(json_lines(*part).encode()))
        pq.write_table(
            pa.Table.from_pylist(part), folder / f"{name}.parquet", row_group_size=90
        )  # fmt: skip
    dataset.save_to_disk(folder / "saved", num_shards=2)
    return [
        Source("jsonl", (str(folder / "*.jsonl"),)),
        Source("jsonl", (str(folder / "*.json.gz"),)),
        Source("parquet", (str(folder / "*.parquet"),)),
        Source("huggingface", (str(folder / "saved"),)),
    ]


def test_every_format_gives_the_same_records(tmp_path: Path, dataset: "Dataset") -> None:
    for source in every_source(tmp_path, dataset):
        found = list(raw_records(source, all_columns))
        assert [record.content for record in found] == RECORDS
        for index in (0, 255, 399, 400, 650, 699):
            rest = list(raw_records(source, all_columns, found[index].after))
            assert rest == found[index + 1 :]
            assert next(raw_records(source, all_columns, found[index].here)) == found[index]


def test_records_say_where_they_are(tmp_path: Path, dataset: "Dataset") -> None:
    lines, _, table, saved = every_source(tmp_path, dataset)
    where = {
        source.kind: [list(raw_records(source, all_columns))[i].where for i in (0, 401)]
        for source in (lines, table, saved)
    }
    assert where == {
        "jsonl": [f"{tmp_path}/0.jsonl:1", f"{tmp_path}/1.jsonl:2"],
        "parquet": [f"{tmp_path}/0.parquet: row 0", f"{tmp_path}/1.parquet: row 1"],
        "huggingface": [f"{tmp_path}/saved: row 0", f"{tmp_path}/saved: row 401"],
    }


def test_only_chosen_columns_are_read(tmp_path: Path, dataset: "Dataset") -> None:
    _, _, table, saved = every_source(tmp_path, dataset)
    for source in (table, saved):
        record = next(raw_records(source, lambda schema, table: ["label"]))
        assert record.content == {"label": 0}
        record = next(raw_records(source, lambda schema, table: ["prompt"], text_as_bytes=True))
        assert record.content == {"prompt": b"p0"}


def test_unreadable_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE", 100)
    (tmp_path / "a.jsonl").write_text(json_lines({"a": 1}, {"a": "b" * 500}, "{", {"a": 2}))
    source = Source("jsonl", (str(tmp_path / "a.jsonl"),))
    first, long, torn, last = (record.content for record in raw_records(source, all_columns))
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert str(long).startswith("longer than")
    assert str(torn).startswith("not valid JSON")


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    whole = gzip.compress(json_lines(*RECORDS).encode())
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz can't be read: "):
        list(raw_records(Source("jsonl", (str(file),)), all_columns))


def test_a_damaged_column_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "a"}]), file, store_schema=False)
    file.write_bytes(file.read_bytes().replace(b"prompt", b"pr\xf4mpt"))
    with pytest.raises(UserError, match=r"a\.parquet is not a Parquet file that can be read"):
        list(raw_records(Source("parquet", (str(file),)), all_columns))
