"""Instruction records of a source: prompt and completion, or a conversation, checked one by one."""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.prepare.documents import MAX_LINE, opened
from minigpt_cli.prepare.pieces import Bad
from minigpt_cli.prepare.sources import Source, source_files
from minigpt_cli.prepare.tables import dataset_batches

_FIELDS = ("prompt", "completion", "messages", "conversations")
_NEEDED = "'prompt' and 'completion', or 'messages'"
_ROWS = 256


@dataclass(frozen=True)
class Completion:
    """``completion`` is what the model learns to write after ``prompt``."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages with a text as ``role`` and ``content`` each, the last one the assistant's."""

    messages: list[dict[str, Any]]


Record = Completion | Conversation


def records(source: Source, bad: Bad) -> Iterator[tuple[str, Record]]:
    """Yield (where it is, record) for every good record of a source of kind jsonl, parquet or
    huggingface, in the source's order.

    ``prompt`` and ``completion`` count where a record has both, else ``messages`` or
    ``conversations``. What follows a conversation's last answer is left out: nothing is learnt
    from it. A malformed record is passed over and told to ``bad`` in one line with file and line.

    Raises ``UserError`` for a source of another kind, files that can't be read, and a table without
    the columns.
    """
    for where, raw in _raw(source, bad):
        record = _record(raw)
        if isinstance(record, str):
            bad(f"{where}: {record}; skipped")
        else:
            yield where, record


def _raw(source: Source, bad: Bad) -> Iterator[tuple[str, dict[str, Any]]]:
    if source.kind == "huggingface":
        yield from _rows(dataset_batches(source)[1], source.path[0])
        return
    if source.kind not in ("jsonl", "parquet"):
        raise UserError(
            f"instructions can't be read from a source of kind {source.kind}: "
            "give JSON lines, Parquet, or a Hugging Face dataset"
        )
    for file in source_files(source):
        try:
            if source.kind == "jsonl":
                yield from _json_lines(file, bad)
            else:
                yield from _parquet(file)
        except (OSError, EOFError, zlib.error) as error:  # the last two from torn .gz files
            reason = error.strerror if isinstance(error, OSError) else None
            raise UserError(f"{file} can't be read: {reason or error}") from None


def _json_lines(file: Path, bad: Bad) -> Iterator[tuple[str, dict[str, Any]]]:
    with opened(file) as stream:
        number = 0
        while line := stream.readline(MAX_LINE):
            number += 1
            where = f"{file}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
                if line.lstrip().startswith(b"["):
                    raise UserError(
                        f"{file} begins with '[': it is a JSON array, not JSON lines; "
                        "write one object per line"
                    )
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                raise UserError(f"{where}: a line longer than {MAX_LINE >> 20} MiB; cut it")
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode())
            except RecursionError:
                bad(f"{where}: JSON nested too deeply; skipped")
            except UnicodeDecodeError as error:
                bad(f"{where}: not valid UTF-8 at byte {error.start} of the line; skipped")
            except ValueError as error:
                bad(f"{where}: not valid JSON ({error}); skipped")
            else:
                if isinstance(record, dict):
                    yield where, record
                else:
                    bad(f"{where}: not a JSON object but {type(record).__name__}; skipped")


def _parquet(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as table:
            columns = _columns(table.schema_arrow.names, str(file))
            yield from _rows(table.iter_batches(_ROWS, columns=columns), str(file))
    except pa.ArrowException as error:
        raise UserError(
            f"{file} is not a Parquet file that can be read: {first_line(error)}"
        ) from None


def _rows(batches: Iterator[Any], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    row = 0
    for batch in batches:
        for record in batch.select(_columns(batch.schema.names, name)).to_pylist():
            yield f"{name}: row {row}", record
            row += 1


def _columns(names: list[str], where: str) -> list[str]:
    found = [name for name in _FIELDS if name in names]
    if not {"messages", "conversations"} & set(found) and len(found) < 2:
        raise UserError(
            f"{where} needs columns {_NEEDED}; it has {', '.join(map(str, names)) or 'none'}"
        )
    return found


def _record(raw: dict[str, Any]) -> Record | str:
    """Return the record, or what is wrong with it."""
    given = {name: raw[name] for name in _FIELDS if raw.get(name) is not None}
    if "prompt" in given and "completion" in given:
        return _completion(given["prompt"], given["completion"])
    for name in ("messages", "conversations"):
        if name in given:
            return _conversation(given[name], name)
    names = ", ".join(sorted(map(repr, raw))[:8]) or "none"
    return f"needs {_NEEDED} (fields: {names})"


def _completion(prompt: Any, completion: Any) -> Record | str:
    for name, text in (("prompt", prompt), ("completion", completion)):
        problem = _text_problem(text)
        if problem:
            return f"{name!r} {problem}"
    return Completion(prompt, completion) if completion else "'completion' is empty"


def _conversation(messages: Any, field: str) -> Record | str:
    if not isinstance(messages, list):
        return f"{field!r} is not a list but {type(messages).__name__}"
    # A table's rows all have the same keys: what a message doesn't have is null there
    kept = [
        {key: value for key, value in message.items() if value is not None}
        if isinstance(message, dict)
        else message
        for message in messages
    ]
    for index, message in enumerate(kept):
        if not isinstance(message, dict):
            return f"message {index} is not an object but {type(message).__name__}"
        for key in ("role", "content"):
            problem = _text_problem(message[key]) if key in message else "is missing"
            if problem:
                return f"{key!r} of message {index} {problem}"
        said_nothing = not message["content"] and not message.get("tool_calls")
        if message["role"] == "assistant" and said_nothing:
            return f"'content' of message {index} is empty"  # and would teach to say nothing
    while kept and kept[-1]["role"] != "assistant":
        kept.pop()
    return Conversation(kept) if kept else f"{field!r} has no message of the role 'assistant'"


def _text_problem(text: Any) -> str | None:
    if not isinstance(text, str):
        return f"is not a string but {type(text).__name__}"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is not Unicode text"
    return None
