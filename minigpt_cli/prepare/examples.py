"""Encode records of prompts and answers: token ids, and the ones that the loss counts."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from minigpt_cli.core.child import Refusal
from minigpt_cli.core.errors import UserError
from minigpt_cli.data.chat import masked_parts
from minigpt_cli.data.tokenizer import eos_id, recognising_special_tokens
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
    """One encoded record: one document of a dataset of instructions.

    Attributes:
        tokens: uint32 [n], n > 1.
        loss_mask: bool [n], True for a token that the loss counts. False for the first token, which
            nothing predicts; True for at least one other.
        bytes: UTF-8 bytes of the text that the loss counts.
    """

    tokens: NDArray[np.uint32]
    loss_mask: NDArray[np.bool_]
    bytes: int


@dataclass(frozen=True)
class _Draft:
    """An example before it is encoded."""

    where: str
    pieces: list[tuple[str, bool]]  # (text, whether the loss counts it)
    is_chat: bool


def examples(
    source: Source,
    tokenizer: "Tokenizer",
    chat_template: str | None,
    variables: dict[str, str],
    bad: OnBad,
) -> Iterator[Example]:
    """Encode the records of a source, in its order.

    A prompt and its completion become ids(prompt) + ids(completion) + end-of-text. The loss counts
    the completion and the end. Special tokens in their text are text.

    A conversation is rendered, and each of its parts is encoded by itself, as the prompt is when
    the model is used. The loss counts the assistant's messages. Special tokens that the template
    writes are recognised, and no end-of-text is appended.

    Args:
        source: JSON lines, Parquet, or a Hugging Face dataset.
        tokenizer: encodes the text.
        chat_template: renders conversations; None if there is none.
        variables: what the template may use besides the messages.
        bad: called with one line for each record that is skipped: a malformed one, or one without a
            token that the loss counts.

    Yields:
        The examples.

    Raises:
        UserError: the source can't be read, or a conversation comes without a template.
    """
    # In a prompt <|im_end|> is text; in what a template wrote it is the token.
    chat_tokenizer = recognising_special_tokens(tokenizer)
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
                bad(f"{draft.where}: has no token to train on; skipped")
            else:
                yield example


def _drafts(
    source: Source, chat_template: str | None, variables: dict[str, str], bad: OnBad
) -> Iterator[_Draft]:
    now = datetime.now()  # templates may write the date: one for the whole dataset
    for where, record in instruction_records(source, bad):
        if isinstance(record, PromptCompletion):
            pieces = [(record.prompt, False), (record.completion, True)]
            yield _Draft(where, pieces, is_chat=False)
            continue
        if chat_template is None:
            raise UserError(
                f"{where} holds a conversation, and there is no chat template: give one "
                "(--chat-template FILE, or [data.source] chat_template; chatml is built in), "
                "or a tokenizer that has one"
            )
        try:
            pieces = masked_parts(chat_template, record.messages, variables, now)
            "".join(text for text, _ in pieces).encode()
        except Refusal as error:
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
    """Join the encoded pieces and ``end``. Return None if the loss would count no token."""
    flags = [counts for _, counts in draft.pieces]
    tokens = np.concatenate([np.array(piece, dtype=np.uint32) for piece in ids])
    loss_mask = np.repeat(flags, [len(piece) for piece in ids])
    if not loss_mask.any():  # an end alone would teach the model to answer nothing
        return None
    if end is not None:
        tokens = np.append(tokens, np.uint32(end))
        loss_mask = np.append(loss_mask, True)
    loss_mask[0] = False
    if not loss_mask.any():
        return None
    size = sum(len(text.encode()) for text, counts in draft.pieces if counts)
    return Example(tokens, loss_mask, size)
