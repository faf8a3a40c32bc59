"""Logits -> next token: pure, batched functions without host-device synchronisation.

The processors and their order are those of transformers' ``generate``: repetition penalty,
temperature, top-k, top-p, min-p. B: batch size, V: vocabulary size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.seed import derived_seed

NOT_FINITE = -1  # the token of a row whose logits are NaN or infinite


@dataclass(frozen=True)
class SamplingOptions:
    """How a token is chosen. None (for the penalty: 1) switches a processor off.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token and ignores top-k, -p, min-p.
        top_k: keep the k likeliest tokens (Fan et al. 2018).
        top_p: keep the fewest tokens with at least this probability in sum (Holtzman et al. 2020).
        min_p: keep tokens with at least this fraction of the highest probability (Nguyen et
            al. 2024).
        repetition_penalty: divides positive logits of earlier tokens, multiplies negative ones
            (Keskar et al. 2019).

    Raises:
        UserError: values out of range; all in one message.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(f"--temperature: must be 0 (greedy) or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            problems.append(f"--top-k: must be 1 or more, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            problems.append(f"--top-p: must lie in (0, 1], not {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p < 1:
            problems.append(f"--min-p: must lie in [0, 1), not {self.min_p}")
        if not 0 < self.repetition_penalty < math.inf:
            problems.append(f"--repetition-penalty: must be above 0, not {self.repetition_penalty}")
        if problems:
            raise UserError("; ".join(problems))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make earlier tokens less likely. logits: (B, V) float; seen: (B, V) bool."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep exactly the k largest of each row of (B, V), of equal ones the lowest ids; rest -inf."""
    k = min(k, logits.shape[-1])
    smallest = logits.topk(k).values[:, -1:]
    above, level = logits > smallest, logits == smallest
    room = k - above.sum(-1, keepdim=True)
    return logits.masked_fill(~(above | (level & (level.cumsum(-1) <= room))), -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest tokens of each row of (B, V) whose probabilities reach p; rest -inf.

    A token stays if all likelier ones sum to less than p. So the likeliest always stays.
    """
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    probs = ordered.softmax(-1)
    likelier = probs.cumsum(-1) - probs
    dropped = torch.empty_like(likelier, dtype=torch.bool).scatter_(-1, ids, likelier >= p)
    return logits.masked_fill(dropped, -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens of (B, V) with at least p times the row's highest probability; rest -inf."""
    probs = logits.softmax(-1)
    return logits.masked_fill(probs < p * probs.amax(-1, keepdim=True), -math.inf)


def process_logits(logits: Tensor, options: SamplingOptions, seen: Tensor | None = None) -> Tensor:
    """Apply penalty, temperature and filters.

    Args:
        logits: (B, V) in any float dtype.
        seen: (B, V) bool, the tokens that get the repetition penalty.

    Returns:
        (B, V) in float32 (float64 stays), -inf for excluded tokens. With a temperature the
        maximum is shifted to 0, because a tiny temperature would overflow otherwise.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if options.repetition_penalty != 1 and seen is not None:
        logits = penalize_repetition(logits, seen, options.repetition_penalty)
    if options.greedy:
        return logits
    logits = (logits - logits.amax(-1, keepdim=True)) / options.temperature
    if options.top_k is not None:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p is not None and options.top_p < 1:  # at 1, rounding would cut the tail
        logits = keep_top_p(logits, options.top_p)
    if options.min_p:
        logits = keep_min_p(logits, options.min_p)
    return logits


def next_tokens(
    logits: Tensor, options: SamplingOptions, uniforms: Tensor, seen: Tensor | None = None
) -> Tensor:
    """Choose one token per row by inverting the cumulative distribution.

    Args:
        logits: (B, V) in any float dtype, the model's output.
        uniforms: (B,) float64 in [0, 1), of ``draw_uniforms``; unused if greedy.
        seen: (B, V) bool, as in ``process_logits``.

    Returns:
        (B,) int64; ``NOT_FINITE`` for rows with a NaN or an infinity.
    """
    sound = logits.amax(-1).isfinite()
    logits = process_logits(logits, options, seen)
    if options.greedy:
        tokens = logits.argmax(-1)
    else:
        # float64: the error of a float32 sum of 50,000 terms exceeds the rarest tokens.
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        cumulative = logits.to(wide).softmax(-1).cumsum(-1)  # (B, V)
        total = cumulative[:, -1:]
        # Stay below the total, also if float32 rounds a uniform up to 1: the chosen token must
        # have a probability above 0.
        drawn = uniforms.to(wide)[:, None] * total
        drawn = torch.minimum(drawn, total.nextafter(torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, drawn, right=True).squeeze(-1)
    return torch.where(sound, tokens, NOT_FINITE)


def draw_uniforms(seed: int, rows: int, steps: int) -> Tensor:
    """Draw the random numbers of sampling: (rows, steps) float64 in [0, 1), on the CPU.

    Each row has its own generator, seeded by (seed, row). So a sample doesn't depend on the number
    of other samples, on their ends, or on the device. torch's global generators are not used.
    """
    drawn = []
    for row in range(rows):
        generator = torch.Generator().manual_seed(derived_seed(seed, row))
        drawn.append(torch.rand(steps, dtype=torch.float64, generator=generator))
    return torch.stack(drawn)
