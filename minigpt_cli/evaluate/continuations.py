"""How likely a model finds given continuations of given contexts, in padded batches."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minigpt_cli.core.console import counted, warn
from minigpt_cli.core.errors import Diverged, UserError
from minigpt_cli.core.faq import faq
from minigpt_cli.model.gpt import GPT
from minigpt_cli.model.precision import autocast

# (batches, what is done with them) -> the same batches; the caller may show how far it is.
Track = Callable[[Sequence[Any], str], Iterable[Any]]

_MOST_LOGITS = 1 << 27  # of one forward pass: 512 MB of float32


@dataclass(frozen=True)
class Continuation:
    """What the model thinks of a continuation.

    Attributes:
        log_likelihood: Sum of its tokens' log probabilities, in nats.
        is_greedy: Whether each of its tokens is the likeliest one.
    """

    log_likelihood: float
    is_greedy: bool


@dataclass
class _Row:
    """A row of a batch, which may answer several requests.

    Attributes:
        tokens: What the model reads.
        scored: How many of the last positions are needed.
        requests: Index and tokens of each continuation.
    """

    tokens: tuple[int, ...]
    scored: int
    requests: list[tuple[int, list[int]]]


@torch.no_grad()
def score_continuations(
    model: GPT,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    dtype: torch.dtype,
    batch_size: int,
    track: Track = lambda batches, what: batches,
) -> list[Continuation]:
    """Score continuations. Pairs that differ in the last token only share a forward pass.

    Args:
        model: In evaluation mode.
        pairs: The tokens of a context and of its continuation, both not empty. If they don't fit
            into the model's context, the beginning is cut.
        dtype: Of matrix products.
        batch_size: The most sequences per batch; long ones with a large vocabulary are fewer.
        track: May show the progress.

    Raises:
        UserError: A continuation is longer than the model's context.
        Diverged: Logits are not finite.
    """
    batches = _batches(_rows(pairs, model.config.max_position_embeddings), model, batch_size)
    results: list[Continuation | None] = [None] * len(pairs)
    for batch in track(batches, "scoring"):
        requests = [index for row in batch for index, _ in row.requests]
        for index, found in zip(requests, _score(model, batch, dtype), strict=True):
            results[index] = found
    assert None not in results
    return [each for each in results if each is not None]


def _rows(pairs: Sequence[tuple[list[int], list[int]]], context: int) -> list[_Row]:
    """Return what the model has to read, the longest first: memory runs out at once or never."""
    rows: dict[tuple[int, ...], _Row] = {}
    cut = 0
    for index, (before, continuation) in enumerate(pairs):
        assert before
        assert continuation
        if len(continuation) > context:
            raise UserError(
                f"a continuation has {len(continuation):,} tokens, more than the model's context "
                f"of {context:,}: leave out its task"
            )
        cut += len(before) + len(continuation) > context + 1
        tokens = tuple([*before, *continuation][-(context + 1) : -1])
        row = rows.setdefault(tokens, _Row(tokens, 0, []))
        row.scored = max(row.scored, len(continuation))
        row.requests.append((index, continuation))
    if cut:
        warn(
            f"{counted(cut, 'request')} of {len(pairs):,} don't fit into the model's context of "
            f"{context:,} tokens: the beginning is cut"
        )
    return sorted(rows.values(), key=lambda row: (-len(row.tokens), row.tokens))


def _batches(rows: list[_Row], model: GPT, batch_size: int) -> list[list[_Row]]:
    """Divide rows of falling length into batches whose logits fit into memory."""
    batches: list[list[_Row]] = []
    for row in rows:
        larger = [*batches[-1], row] if batches else [row]
        logits = len(larger) * _kept(larger) * model.config.vocab_size
        if batches and len(larger) <= batch_size and logits <= _MOST_LOGITS:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def _kept(batch: list[_Row]) -> int:
    """Return from how many last positions of a padded batch logits are needed."""
    length = max(len(row.tokens) for row in batch)
    return max(length - len(row.tokens) + row.scored for row in batch)


def _score(model: GPT, batch: list[_Row], dtype: torch.dtype) -> list[Continuation]:
    """Score the requests of a batch, in its order."""
    device = model.embed_tokens.weight.device
    length, kept = max(len(row.tokens) for row in batch), _kept(batch)
    padded = [[*row.tokens, *[0] * (length - len(row.tokens))] for row in batch]
    with autocast(dtype, device):
        logits = model(torch.tensor(padded, device=device), logits_to_keep=kept)  # (B, kept, V)
    sums, greedy = [], []
    for row, its_logits in zip(batch, logits, strict=True):
        end = len(row.tokens) - (length - kept)
        log_probs = its_logits[end - row.scored : end].float().log_softmax(-1)
        likeliest = log_probs.argmax(-1)
        for _, continuation in row.requests:
            targets = torch.tensor(continuation, device=device)
            places = slice(row.scored - len(continuation), None)
            sums.append(log_probs[places].gather(-1, targets[:, None]).sum())
            greedy.append((likeliest[places] == targets).all())
    return _on_host(torch.stack(sums), torch.stack(greedy))


def _on_host(sums: Tensor, greedy: Tensor) -> list[Continuation]:
    found = [Continuation(*each) for each in zip(sums.tolist(), greedy.tolist(), strict=True)]
    if not all(math.isfinite(each.log_likelihood) for each in found):
        raise Diverged(
            "the model's logits are not finite: its weights diverged in training, "
            f"take an earlier checkpoint {faq('loss-is-nan')}"
        )
    return found
