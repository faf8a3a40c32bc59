"""From logits to the next token: pure functions, batched over rows, no host-device synchronisation.

Penalty, filters and their order are those of transformers' ``generate``: repetition penalty,
temperature, top-k, top-p, min-p. B is the number of rows, V the vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.seed import derived_seed

NOT_FINITE = -1  # stands for the token of a row whose logits are NaN or infinite


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen; what is None (or a penalty of 1) is off.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token and ignores the filters.
        top_k: keep the k likeliest tokens (Fan et al. 2018).
        top_p: keep the fewest tokens that hold this much probability (Holtzman et al. 2020).
        min_p: keep tokens at least this fraction as likely as the likeliest (Nguyen et al. 2024).
        repetition_penalty: divides positive logits of tokens seen before, multiplies negative
            ones (Keskar et al. 2019).

    Raises:
        UserError: values out of range, all of them named at once.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"top_k must be 1 or more, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"top_p must lie in (0, 1], not {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p < 1:
            problems.append(f"min_p must lie in [0, 1), not {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            problems.append(f"repetition_penalty must be above 0, not {self.repetition_penalty}")
        if problems:
            raise UserError("; ".join(problems))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make seen tokens less likely. logits: (B, V) float; seen: (B, V) bool."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Exactly the k largest of each row of (B, V), the rest -inf; of equals the lowest ids."""
    k = min(k, logits.shape[-1])
    smallest = logits.topk(k).values[:, -1:]
    above, level = logits > smallest, logits == smallest
    room = k - above.sum(-1, keepdim=True)
    return logits.masked_fill(~(above | (level & (level.cumsum(-1) <= room))), -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest tokens of each row of (B, V) whose probability reaches p, the rest -inf.

    A token stays if what is likelier holds less than p, so the likeliest always stays.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(-1)
    likelier = probs.cumsum(-1) - probs
    dropped = torch.empty_like(likelier, dtype=torch.bool).scatter_(-1, ids, likelier >= p)
    return logits.masked_fill(dropped, -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens of each row of (B, V) at least p times as likely as the likeliest, the rest -inf."""
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < p * probs.amax(-1, keepdim=True), -math.inf)


def process_logits(logits: Tensor, options: SamplingOptions, seen: Tensor | None = None) -> Tensor:
    """The logits that a token is drawn from: penalty, temperature and filters applied.

    Args:
        logits: (B, V) in any float dtype.
        seen: (B, V) bool, the tokens that the repetition penalty holds back.

    Returns:
        (B, V) in float32 (float64 stays), -inf where a token can't be drawn. Where a temperature
        applies they are shifted to a maximum of 0, or a tiny temperature would overflow.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if options.repetition_penalty != 1 and seen is not None:
        logits = penalize_repetition(logits, seen, options.repetition_penalty)
    if options.greedy:
        return logits
    logits = (logits - logits.amax(-1, keepdim=True)) / options.temperature
    if options.top_k is not None:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p is not None and options.top_p < 1:  # at 1 rounding would cut the tail
        logits = keep_top_p(logits, options.top_p)
    if options.min_p:
        logits = keep_min_p(logits, options.min_p)
    return logits


def next_tokens(
    logits: Tensor, options: SamplingOptions, uniforms: Tensor, seen: Tensor | None = None
) -> Tensor:
    """Choose one token a row, by inverting the cumulative distribution.

    Args:
        logits: (B, V) in any float dtype, as the model gives them.
        uniforms: (B,) float64 in [0, 1), see ``draw_uniforms``; unused when greedy.
        seen: (B, V) bool, as in ``process_logits``.

    Returns:
        (B,) int64, ``NOT_FINITE`` for rows whose logits hold a NaN or an infinity.
    """
    sound = logits.amax(-1).isfinite()
    logits = process_logits(logits, options, seen)
    if options.greedy:
        tokens = logits.argmax(-1)
    else:
        # float64, because float32 sums of 50,000 terms are off by more than the rarest tokens.
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        cumulative = logits.to(wide).softmax(-1).cumsum(-1)  # (B, V)
        total = cumulative[:, -1:]
        # Below the total even where float32 rounds a uniform up to 1, so that the token found has
        # a probability above 0.
        drawn = uniforms.to(wide)[:, None] * total
        drawn = torch.minimum(drawn, total.nextafter(torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, drawn, right=True).squeeze(-1)
    return torch.where(sound, tokens, NOT_FINITE)


def draw_uniforms(seed: int, rows: int, steps: int) -> Tensor:
    """(rows, steps) float64 in [0, 1) on the CPU, the only randomness of sampling.

    Each row has a generator of its own, seeded by (seed, row): a sample doesn't depend on how
    many others are drawn with it, on when they end, or on the device. The global generators of
    torch stay as they are.
    """
    drawn = []
    for row in range(rows):
        generator = torch.Generator().manual_seed(derived_seed(seed, row))
        drawn.append(torch.rand(steps, dtype=torch.float64, generator=generator))
    return torch.stack(drawn)
