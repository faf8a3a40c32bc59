"""Records -> examples: token ids, and which of them the loss counts for."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from minigpt_cli.core.errors import UserError
from minigpt_cli.data.chat import parts
from minigpt_cli.data.tokenizer import eos_id
from minigpt_cli.prepare.instruction_records import PromptCompletion, instruction_records
from minigpt_cli.prepare.pieces import OnBad
from minigpt_cli.prepare.sources import Source

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Encoded at once: an encoding takes up to 200 times its text in memory while it lasts.
_BATCH_EXAMPLES = 1024
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Example:
    """``tokens``: uint32 [n], n > 1. ``trained``: bool [n], whether the loss counts for a token;
    never for the first, for nothing predicts it, and for at least one other. ``trained_bytes``: the
    UTF-8 bytes of the trained text.
    """

    tokens: NDArray[np.uint32]
    trained: NDArray[np.bool_]
    trained_bytes: int


@dataclass(frozen=True)
class _Draft:
    """An example before it is encoded: pieces of (text, trained)."""

    where: str
    pieces: list[tuple[str, bool]]
    is_chat: bool


def examples(
    source: Source,
    tokenizer: "Tokenizer",
    chat_template: str | None,
    variables: dict[str, str],
    bad: OnBad,
) -> Iterator[Example]:
    """Yield the examples of a source's records, in the source's order.

    A prompt and its completion become ids(prompt) + ids(completion) + end-of-text, of which the
    completion and the end are trained. A conversation is rendered, and each of its parts encoded by
    itself, as the prompt is when the model is used; what the assistant wrote is trained. Malformed
    records, and those that leave nothing to train on, are told to ``bad``.

    Raises ``UserError`` as `instruction_records` does, and for a conversation without a template.
    """
    from tokenizers import Tokenizer

    # In a prompt <|im_end|> is text; in what a template wrote it is the token.
    chat_tokenizer = Tokenizer.from_str(tokenizer.to_str())
    chat_tokenizer.encode_special_tokens = False
    end = eos_id(tokenizer)
    for drafts in _batches(_drafts(source, chat_template, variables, bad)):
        texts: dict[bool, list[str]] = {False: [], True: []}
        for draft in drafts:
            texts[draft.is_chat] += [text for text, _ in draft.pieces]
        encoded = {
            is_chat: iter(each.encode_batch_fast(texts[is_chat], add_special_tokens=False))
            for is_chat, each in ((False, tokenizer), (True, chat_tokenizer))
        }
        for draft in drafts:
            ids = [next(encoded[draft.is_chat]).ids for _ in draft.pieces]
            example = _example(draft, ids, None if draft.is_chat else end)
            if example is None:
                bad(f"{draft.where}: no token is left to train on; skipped")
            else:
                yield example


def _drafts(
    source: Source, chat_template: str | None, variables: dict[str, str], bad: OnBad
) -> Iterator[_Draft]:
    now = datetime.now()  # templates that tell the date tell one date to the whole dataset
    for where, record in instruction_records(source, bad):
        if isinstance(record, PromptCompletion):
            pieces = [(record.prompt, False), (record.completion, True)]
            yield _Draft(where, pieces, is_chat=False)
            continue
        if chat_template is None:
            raise UserError(
                f"{where} holds a conversation, and there is no chat template: "
                "name one, or a tokenizer that brings one"
            )
        try:
            pieces = parts(chat_template, record.messages, variables, now)
            "".join(text for text, _ in pieces).encode()
        except UserError as error:
            bad(f"{where}: {error}; skipped")
        except UnicodeEncodeError:
            bad(f"{where}: half of a surrogate pair, which is not Unicode text; skipped")
        else:
            yield _Draft(where, pieces, is_chat=True)


def _batches(drafts: Iterator[_Draft]) -> Iterator[list[_Draft]]:
    batch: list[_Draft] = []
    size = 0
    for draft in drafts:
        batch.append(draft)
        size += sum(len(text) for text, _ in draft.pieces)
        if len(batch) >= _BATCH_EXAMPLES or size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _example(draft: _Draft, ids: list[list[int]], end: int | None) -> Example | None:
    """Return the example whose pieces have these ids, followed by ``end``; None when nothing is
    left to train on.
    """
    flags = [trained for _, trained in draft.pieces]
    tokens = np.concatenate([np.array(piece, dtype=np.uint32) for piece in ids])
    trained = np.repeat(flags, [len(piece) for piece in ids])
    if not trained.any():  # an end alone would teach to say nothing
        return None
    if end is not None:
        tokens = np.append(tokens, np.uint32(end))
        trained = np.append(trained, True)
    trained[0] = False
    if not trained.any():
        return None
    size = sum(len(text.encode()) for text, is_trained in draft.pieces if is_trained)
    return Example(tokens, trained, size)
