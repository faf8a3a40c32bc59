"""Read the instruction records of a source: prompt and completion, or a conversation."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from minigpt_cli.core.errors import UserError
from minigpt_cli.prepare.pieces import OnBad
from minigpt_cli.prepare.readers import field_names, raw_records, text_problem
from minigpt_cli.prepare.sources import Source

if TYPE_CHECKING:
    import pyarrow as pa

_CONVERSATIONS = ("messages", "conversations")
_FIELDS = ("prompt", "completion", *_CONVERSATIONS)
_NEEDED = "'prompt' and 'completion', or 'messages'"


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt, and the completion that the model learns to write after it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Conversation:
    """Messages with a ``role`` and a ``content`` in text; the last one is the assistant's."""

    messages: list[dict[str, Any]]


Instruction = PromptCompletion | Conversation


def instruction_records(source: Source, on_bad: OnBad) -> Iterator[tuple[str, Instruction]]:
    """Read the records of a source of kind jsonl, parquet or huggingface, in the source's order.

    If a record has ``prompt`` and ``completion``, these are taken, else ``messages`` or
    ``conversations``. Messages after the assistant's last one are cut off: they train nothing.

    Args:
        source: What to read.
        on_bad: Called with one line for each malformed record, which is skipped.

    Yields:
        Each good record, with its place for messages (``file:line``).

    Raises:
        UserError: The source is of another kind or can't be read, or a table lacks the columns.
    """
    if source.kind not in ("jsonl", "parquet", "huggingface"):
        raise UserError(
            f"instructions can't be read from a source of kind {source.kind}: "
            "give JSON lines, Parquet, or a Hugging Face dataset"
        )
    for record in raw_records(source, _columns):
        checked = record.content if isinstance(record.content, str) else _check(record.content)
        if isinstance(checked, str):
            on_bad(f"{record.where}: {checked}; skipped")
        else:
            yield record.where, checked


def _columns(schema: "pa.Schema", table: str) -> list[str]:
    found = [name for name in _FIELDS if name in schema.names]
    if not set(_CONVERSATIONS) & set(found) and len(found) < 2:
        raise UserError(
            f"{table} needs columns {_NEEDED}; it has {', '.join(schema.names) or 'none'}"
        )
    return found


def _check(fields: dict[str, Any]) -> Instruction | str:
    """Return the record, or what is wrong with it."""
    given = {name: fields[name] for name in _FIELDS if fields.get(name) is not None}
    if "prompt" in given and "completion" in given:
        return _prompt_completion(given["prompt"], given["completion"])
    for name in _CONVERSATIONS:
        if name in given:
            return _conversation(given[name], name)
    return f"needs {_NEEDED} (fields: {field_names(fields)})"


def _prompt_completion(prompt: Any, completion: Any) -> Instruction | str:
    for name, text in (("prompt", prompt), ("completion", completion)):
        problem = text_problem(text)
        if problem:
            return f"{name!r} {problem}"
    return PromptCompletion(prompt, completion) if completion else "'completion' is empty"


def _conversation(messages: Any, field: str) -> Instruction | str:
    if not isinstance(messages, list):
        return f"{field!r} is not a list but {type(messages).__name__}"
    # In a table all messages have the same keys; a key that a message lacks is null.
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
            problem = text_problem(message[key]) if key in message else "is missing"
            if problem:
                return f"{key!r} of message {index} {problem}"
        is_empty = not message["content"] and not message.get("tool_calls")
        if message["role"] == "assistant" and is_empty:  # it would train the model to be silent
            return f"'content' of message {index} is empty"
    while kept and kept[-1]["role"] != "assistant":
        kept.pop()
    return Conversation(kept) if kept else f"{field!r} has no message of the role 'assistant'"
