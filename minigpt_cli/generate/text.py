"""Tokens -> text as a stream: whole characters only, without stop strings."""

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

_BROKEN = "\ufffd"  # decoders' text for bytes that are not, or not yet, a UTF-8 character
_CONTEXT = 8  # tokens kept before the new ones; a character has at most 4


@dataclass(frozen=True)
class TextChunk:
    """More text of one sample; ``finish_reason`` is set on its last chunk only."""

    sample: int
    text: str
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """A sample's whole text, without the prompt, and why it ended."""

    text: str
    finish_reason: FinishReason


@dataclass
class Detokenizer:
    """Turns one sample's tokens into text; holds back text that the next token could change.

    Decoding each token alone is wrong: a character's bytes may be split over tokens, and some
    decoders treat the first token differently. So a short window of tokens is decoded; characters
    after the first ``emitted`` ones are new.
    """

    tokenizer: "Tokenizer"
    special: frozenset[int]
    window: list[int] = field(default_factory=list)
    emitted: int = 0

    def push(self, token: int) -> str:
        """Add a token; return the text that is now certain."""
        if token in self.special:
            return ""
        self.window.append(token)
        text = self.tokenizer.decode(self.window)
        # An unfinished character shows as up to 3 marks: one per byte, or one for all.
        unsure = min(3, len(text) - len(text.rstrip(_BROKEN)))
        end = max(self.emitted, len(text) - unsure)
        piece = text[self.emitted : end]
        self.emitted = end
        if len(self.window) > 4 * _CONTEXT:
            self.window = self.window[-_CONTEXT:]
            self.emitted = max(0, len(self.tokenizer.decode(self.window)) - (len(text) - end))
        return piece

    def flush(self) -> str:
        """Return the text held back, after the last token; U+FFFD for invalid bytes."""
        text = self.tokenizer.decode(self.window)[self.emitted :]
        self.emitted += len(text)
        return text


def detokenizer(tokenizer: "Tokenizer", prompt_ids: Sequence[int]) -> Detokenizer:
    """Make a detokenizer for the text after the prompt. Special tokens give no text."""
    added = tokenizer.get_added_tokens_decoder()
    special = frozenset(token for token, entry in added.items() if entry.special)
    window = [token for token in prompt_ids[-_CONTEXT:] if token not in special]
    before = tokenizer.decode(window)
    if before.endswith(_BROKEN):  # a character cut in half: decode the new tokens alone
        window, before = [], ""
    return Detokenizer(tokenizer, special, window, len(before))


def split_at_stop(text: str, stop: Sequence[str]) -> tuple[str, str, bool]:
    """Cut text at the first complete stop string; of several that end there, at the longest.

    Returns:
        The text to show, the text to hold back because a stop string may begin in it, and whether
        a stop string was found (then nothing is held back).
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
    """Continue a prompt ``num_samples`` times; yield text as soon as it is certain.

    The arguments are those of ``generate``. ``stop`` holds strings that end a sample and are not
    part of its text, however tokens split them. ``join_chunks`` joins the chunks of each sample. A
    U+FFFD means that the model wrote invalid UTF-8.

    Raises:
        UserError: an empty stop string; and the errors of ``generate``.
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
    """Run the loop of ``stream_text``."""
    decoders = [
        Detokenizer(start.tokenizer, start.special, list(start.window), start.emitted)
        for _ in finished
    ]
    held = [""] * len(finished)  # per sample: text in which a stop string may begin
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


def join_chunks(chunks: Iterable[TextChunk]) -> list[Completion]:
    """Join the chunks of ``stream_text``: one completion for each sample."""
    texts: dict[int, list[str]] = {}
    reasons: dict[int, FinishReason] = {}
    for chunk in chunks:
        texts.setdefault(chunk.sample, []).append(chunk.text)
        if chunk.finish_reason is not None:
            reasons[chunk.sample] = chunk.finish_reason
    return [Completion("".join(texts[i]), reasons[i]) for i in sorted(texts)]
