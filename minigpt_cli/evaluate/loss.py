"""Loss, perplexity and bits per byte, each token weighted the same."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from minigpt_cli.data.batches import Gathered, Rows
from minigpt_cli.distributed.world import World
from minigpt_cli.model.cross_entropy import IGNORE
from minigpt_cli.model.gpt import GPT


@dataclass(frozen=True)
class Evaluation:
    """What was measured over ``tokens`` predicted tokens that stand for ``bytes`` of text."""

    loss: float  # nats per token
    tokens: int
    bytes: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable across tokenizers: total nats / ln 2 / bytes of the predicted text."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan


def fixed_windows(available: int, wanted: int) -> NDArray[np.int64]:
    """The same ``wanted`` windows every time, spread evenly over all that there are."""
    count = min(available, wanted)
    return np.arange(count, dtype=np.int64) * available // max(1, count)


def window_batches(
    rows: Rows, ids: NDArray[np.int64], batch: int, rank: int = 0, ranks: int = 1
) -> Iterator[Gathered]:
    """Up to ``batch`` rows at a time of those of ``ids`` that are this rank's.

    Every rank gets the same number of batches, since sharded models run in step; one that has no
    windows left gets a row that counts for nothing.
    """
    for start in range(0, len(ids), batch * ranks):
        own = ids[start + rank * batch : min(start + (rank + 1) * batch, len(ids))]
        inputs, targets, segments = rows.gather(own if len(own) else ids[:1])
        yield inputs, targets if len(own) else np.full_like(targets, IGNORE), segments


def stream_batches(
    read: Callable[[int, int], NDArray[np.integer]], tokens: int, sequence_length: int, batch: int
) -> Iterator[Gathered]:
    """Every token of a stream as a target once, but the first; the last batch holds the tail.

    Args:
        read: (start, stop) -> those tokens.
        tokens: how many there are.
    """
    whole = max(0, tokens - 1) // sequence_length
    for first in range(0, whole, batch):
        rows = min(batch, whole - first)
        start = first * sequence_length
        flat = np.asarray(read(start, start + rows * sequence_length + 1), dtype=np.int64)
        starts = np.arange(rows)[:, None] * sequence_length
        windows = flat[starts + np.arange(sequence_length + 1)]
        yield windows[:, :-1], windows[:, 1:], None
    if whole * sequence_length < tokens - 1:
        tail = np.asarray(read(whole * sequence_length, tokens), dtype=np.int64)[None]
        yield tail[:, :-1], tail[:, 1:], None


@torch.no_grad()
def evaluate(
    model: GPT,
    batches: Iterable[Gathered],
    *,
    dtype: torch.dtype,
    token_bytes: NDArray[np.int32] | None,
    bytes_per_token: float,
    stop: Callable[[], bool] = lambda: False,
    world: World | None = None,
) -> Evaluation | None:
    """Loss over batches of windows, without dropout; the model's mode is put back.

    Args:
        batches: inputs, targets (``IGNORE`` counts for nothing) and segments, each (n, T).
        dtype: what matrix products are computed in.
        token_bytes: (V,) UTF-8 bytes that each token stands for; where a tokenizer has no such
            table, ``bytes_per_token`` counts instead.
        stop: asked before each batch; True gives the evaluation up, and the result is None.
        world: whose ranks share the batches out, and get the same result.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens, text_bytes = 0, 0.0
    try:
        for batch in batches:
            if stop():
                return None
            inputs, targets, *segments = (
                torch.from_numpy(each).to(device) for each in batch if each is not None
            )
            half = dtype in (torch.bfloat16, torch.float16)
            with torch.autocast(device.type, dtype if half else None, enabled=half):
                total += model(inputs, targets, *segments)
            counted = batch[1][batch[1] != IGNORE]
            tokens += counted.size
            text_bytes += (
                counted.size * bytes_per_token
                if token_bytes is None
                else int(token_bytes[counted].sum(dtype=np.int64))
            )
    finally:
        model.train(training)
    counts = torch.tensor([tokens, text_bytes], dtype=torch.float64, device=device)
    sums = torch.cat([total[None], counts])
    loss, all_tokens, all_bytes = (world.all_reduce_sum(sums) if world else sums).tolist()
    assert all_tokens, "nothing to evaluate on"
    return Evaluation(loss / all_tokens, int(all_tokens), all_bytes)
