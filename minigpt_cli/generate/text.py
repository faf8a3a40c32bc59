"""Tokens to text while they come: whole characters only, and nothing of a stop string."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from minigpt_cli.core.errors import UserError
from minigpt_cli.data.tokenizer import vocabulary_size
from minigpt_cli.generate.engine import generate
from minigpt_cli.generate.sampling import SamplingOptions
from minigpt_cli.model.gpt import GPT

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FinishReason = Literal["stop", "eos", "length"]

_BROKEN = "\ufffd"  # what decoders put for bytes that are no UTF-8 character, or none yet
_CONTEXT = 8  # tokens kept before the new ones; a character has at most 4


@dataclass(frozen=True)
class TextChunk:
    """More text of one sample; ``finish_reason`` is set on its last piece and on no other."""

    sample: int
    text: str
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """What a sample's pieces add up to: its text, without the prompt, and why it ended."""

    text: str
    finish_reason: FinishReason


@dataclass
class Detokenizer:
    """Turns one sample's tokens into text, holding back what a further token could still change.

    Decoding each token alone is wrong: a character's bytes may be spread over tokens, and some
    decoders treat the first token unlike the rest. So a short window of tokens is decoded, and
    what goes beyond the ``emitted`` characters of it is new.
    """

    tokenizer: "Tokenizer"
    special: frozenset[int]
    window: list[int] = field(default_factory=list)
    emitted: int = 0

    def push(self, token: int) -> str:
        """The text that is certain now that ``token`` has come."""
        if token in self.special:
            return ""
        self.window.append(token)
        text = self.tokenizer.decode(self.window)
        # An unfinished character shows as up to 3 marks, one of each byte, or one of them all.
        unsure = min(3, len(text) - len(text.rstrip(_BROKEN)))
        end = max(self.emitted, len(text) - unsure)
        piece = text[self.emitted : end]
        self.emitted = end
        if len(self.window) > 4 * _CONTEXT:
            self.window = self.window[-_CONTEXT:]
            self.emitted = max(0, len(self.tokenizer.decode(self.window)) - (len(text) - end))
        return piece

    def flush(self) -> str:
        """The text held back, when no more tokens come; U+FFFD for bytes that are no character."""
        text = self.tokenizer.decode(self.window)[self.emitted :]
        self.emitted += len(text)
        return text


def detokenizer(tokenizer: "Tokenizer", prompt_ids: Sequence[int]) -> Detokenizer:
    """A detokenizer for what follows the prompt. Special tokens are no text."""
    added = tokenizer.get_added_tokens_decoder()
    special = frozenset(token for token, entry in added.items() if entry.special)
    window = [token for token in prompt_ids[-_CONTEXT:] if token not in special]
    before = tokenizer.decode(window)
    if before.endswith(_BROKEN):  # a character cut in half: what follows stands alone
        window, before = [], ""
    return Detokenizer(tokenizer, special, window, len(before))


def split_at_stop(text: str, stop: Sequence[str]) -> tuple[str, str, bool]:
    """Cut text at the stop string that is complete first, the longest of those that end there.

    Returns:
        What may be shown, what must be held back because a stop string may have begun in it, and
        whether a stop string was found (then nothing is held back).
    """
    found = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    if found:
        return text[: min(found)[1]], "", True
    held = 0
    for s in stop:
        lengths = range(min(len(s) - 1, len(text)), held, -1)
        held = next((n for n in lengths if text.endswith(s[:n])), held)
    return text[: len(text) - held], text[len(text) - held :], False


def stream_text(
    model: GPT,
    tokenizer: "Tokenizer",
    prompt_ids: list[int],
    options: SamplingOptions,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    seed: int = 0,
    eos_id: int | None = None,
    stop_token_ids: frozenset[int] = frozenset(),
    stop: Sequence[str] = (),
    use_cache: bool = True,
    dtype: torch.dtype | None = None,
) -> Iterator[TextChunk]:
    """Continue a prompt ``num_samples`` times and yield the text as soon as it is certain.

    The arguments are those of ``generate``; ``stop`` are strings that end a sample and are not
    part of its text, wherever tokens split them. A sample's pieces, joined, are its completion
    (``complete`` joins them); a U+FFFD among them means that the model wrote invalid UTF-8.

    Raises:
        UserError: an empty stop string, and what ``generate`` raises.
    """
    if "" in stop:
        raise UserError("a stop string must not be empty")
    finished = [False] * num_samples
    steps = generate(
        model,
        prompt_ids,
        options,
        max_new_tokens=max_new_tokens,
        num_samples=num_samples,
        seed=seed,
        eos_id=eos_id,
        stop_token_ids=stop_token_ids,
        use_cache=use_cache,
        dtype=dtype,
        vocab_size=vocabulary_size(tokenizer),
        finished=finished,
    )
    return _pieces(
        steps,
        detokenizer(tokenizer, prompt_ids),
        max_new_tokens,
        stop_token_ids | {eos_id},
        stop,
        finished,
    )


def _pieces(
    steps: Iterator[list[int | None]],
    start: Detokenizer,
    max_new_tokens: int,
    stop_token_ids: frozenset[int | None],
    stop: Sequence[str],
    finished: list[bool],
) -> Iterator[TextChunk]:
    """The loop behind ``stream_text``."""
    decoders = [
        Detokenizer(start.tokenizer, start.special, list(start.window), start.emitted)
        for _ in finished
    ]
    held = [""] * len(finished)  # per sample: characters that a stop string may begin with
    for step, tokens in enumerate(steps, start=1):
        for sample, token in enumerate(tokens):
            if token is None:
                continue
            reason: FinishReason | None = None
            if token in stop_token_ids:
                reason = "eos"
            else:
                held[sample] += decoders[sample].push(token)
                reason = "length" if step == max_new_tokens else None
            shown, kept, stopped = split_at_stop(held[sample], stop)
            if reason is not None and not stopped:
                shown, kept, stopped = split_at_stop(held[sample] + decoders[sample].flush(), stop)
                shown += kept
            if stopped:
                reason = "stop"
                finished[sample] = True
            held[sample] = kept
            if shown or reason is not None:
                yield TextChunk(sample, shown, reason)


def complete(pieces: Iterable[TextChunk]) -> list[Completion]:
    """All of the pieces of ``stream_text``, joined: one completion for each sample."""
    texts: dict[int, list[str]] = {}
    reasons: dict[int, FinishReason] = {}
    for piece in pieces:
        texts.setdefault(piece.sample, []).append(piece.text)
        if piece.finish_reason is not None:
            reasons[piece.sample] = piece.finish_reason
    return [Completion("".join(texts[i]), reasons[i]) for i in sorted(texts)]
