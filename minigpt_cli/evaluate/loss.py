"""Loss, perplexity and bits per byte. Each token has the same weight."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from minigpt_cli.core.constants import IGNORE_INDEX
from minigpt_cli.data.loader import Gathered, Sequences
from minigpt_cli.distributed.world import World
from minigpt_cli.model.compiled import run_eagerly
from minigpt_cli.model.gpt import GPT
from minigpt_cli.model.precision import autocast


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation.

    Attributes:
        loss: mean cross-entropy, in nats per token.
        tokens: number of predicted tokens.
        bytes: UTF-8 bytes of text that these tokens stand for.
    """

    loss: float
    tokens: int
    bytes: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Total nats / ln 2 / bytes of the predicted text: comparable across tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan


def fixed_sequences(available: int, wanted: int) -> NDArray[np.int64]:
    """Return the ids of ``wanted`` sequences, spread evenly over all; the same in every call."""
    count = min(available, wanted)
    return np.arange(count, dtype=np.int64) * available // max(1, count)


def sequence_batches(
    sequences: Sequences, ids: NDArray[np.int64], batch_size: int, rank: int = 0, ranks: int = 1
) -> Iterator[Gathered]:
    """Yield this rank's part of the sequences ``ids``, at most ``batch_size`` at a time.

    Every rank gets the same number of batches, because sharded models run in step. A rank without
    sequences for the last batch gets one whose targets are all ``IGNORE_INDEX``.
    """
    for start in range(0, len(ids), batch_size * ranks):
        own = ids[start + rank * batch_size : min(start + (rank + 1) * batch_size, len(ids))]
        inputs, targets, segment_ids = sequences.gather(own if len(own) else ids[:1])
        yield inputs, targets if len(own) else np.full_like(targets, IGNORE_INDEX), segment_ids


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
    """Compute the loss over batches, without dropout; restore the model's mode afterwards.

    Args:
        batches: inputs, targets (``IGNORE_INDEX`` is left out of the loss) and segment_ids, each
            (n, T).
        dtype: of matrix products.
        token_bytes: (V,) UTF-8 bytes of each token; if None, ``bytes_per_token`` is used.
        stop: called before each batch; evaluation ends when it returns True.
        world: the ranks that share the batches. All get the same result.

    Returns:
        None if ``stop`` ended it.
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
            inputs, targets, *segment_ids = (
                torch.from_numpy(each).to(device) for each in batch if each is not None
            )
            with autocast(dtype, device), run_eagerly(model):
                total += model(inputs, targets, *segment_ids)
            counted = batch[1][batch[1] != IGNORE_INDEX]
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
