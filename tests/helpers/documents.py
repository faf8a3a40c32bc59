"""Read documents whole, and write JSON lines."""

import json

from minigpt_cli.prepare.documents import documents
from minigpt_cli.prepare.sources import Source


def read_documents(source: Source, **options: object) -> list[str]:
    """Read the whole documents of a source, as text."""
    found, parts = [], []
    for piece in documents(source, **options):  # type: ignore[arg-type]
        parts.append(piece.data)
        if piece.last:
            found.append(b"".join(parts).decode())
            parts = []
    assert not parts
    return found


def json_lines(*records: object) -> str:
    """Write one line per record; strings are lines as they are."""
    return "".join(
        (record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records
    )
