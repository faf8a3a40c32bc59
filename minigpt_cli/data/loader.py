"""Read sequences of a split as inputs and targets on the device, one step ahead."""

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt_cli.core.threads import device_thread
from minigpt_cli.data.dataset import TokenSplit
from minigpt_cli.data.order import sample_ids
from minigpt_cli.data.packing import PackedSequences

# (inputs, targets, segment_ids or None), each int64 [n, T]
Gathered = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64] | None]


@dataclass(frozen=True)
class TokenSequences:
    """A split of text, cut into sequences of one length.

    Attributes:
        split: the tokens.
        sequence_length: predicted tokens of a sequence.
    """

    split: TokenSplit
    sequence_length: int

    @property
    def num_sequences(self) -> int:
        """The number of sequences."""
        return self.split.num_sequences(self.sequence_length)

    def gather(self, ids: NDArray[np.int64]) -> Gathered:
        """Read sequences by number.

        Args:
            ids: int64 [n], in [0, ``num_sequences``).

        Returns:
            (inputs, targets, None), the arrays int64 [n, sequence_length].

        Raises:
            Damaged: a token isn't in the vocabulary.
        """
        tokens = self.split.gather(ids, self.sequence_length)
        return tokens[:, :-1], tokens[:, 1:], None


Sequences = TokenSequences | PackedSequences


# (inputs, targets, segment ids or None, segments of all its sequences or None)
MicroBatch = tuple[Tensor, Tensor, Tensor | None, int | None]


class Batch(NamedTuple):
    """This rank's part of one optimizer step's batch, on the device.

    Attributes:
        inputs: int64 [n, T].
        targets: int64 [n, T], ``IGNORE_INDEX`` where the loss doesn't count.
        segment_ids: int64 [n, T], the number of each token's document in its sequence. A token
            attends to its own document alone. None: sequences are not packed.
        segment_counts: of each sequence, on the host, so that nobody has to ask the device.
    """

    inputs: Tensor
    targets: Tensor
    segment_ids: Tensor | None
    segment_counts: list[int] | None = None

    def micro_batches(self, size: int) -> Iterator[MicroBatch]:
        """Yield the arguments of the model's forward passes, ``size`` sequences in each."""
        for start in range(0, len(self.inputs), size):
            part = slice(start, start + size)
            ids, counts = self.segment_ids, self.segment_counts
            yield (
                self.inputs[part],
                self.targets[part],
                None if ids is None else ids[part],
                None if counts is None else sum(counts[part]),
            )


class BatchLoader:
    """Read the batch of a step; while the caller trains on it, read the next one.

    The batch of a step depends on the step alone. Reading ahead keeps no other state.

    Attributes:
        sequences: what the batches are drawn from.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        seed: int,
        global_batch_size: int,
        local_slice: slice,
        device: torch.device,
    ):
        """Start the reading thread; ``close`` ends it.

        Args:
            sequences: what to draw batches from.
            seed: the run's seed, which decides the order.
            global_batch_size: sequences per step, over all ranks.
            local_slice: this rank's part of the global batch.
            device: where batches go.
        """
        self.sequences = sequences
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._local_slice = local_slice
        self._device = device
        self._reader = device_thread("batches", device)
        self._ahead: tuple[int, Future[Batch]] | None = None

    def __call__(self, step: int) -> Batch:
        """Return the batch of the step that follows ``step`` steps, and start to read the next."""
        ahead, self._ahead = self._ahead, None
        read = ahead[1].result() if ahead and ahead[0] == step else self._read(step)
        self._ahead = (step + 1, self._reader.submit(self._read, step + 1))
        ids = read.segment_ids
        return Batch(
            read.inputs.to(self._device, non_blocking=True),
            read.targets.to(self._device, non_blocking=True),
            None if ids is None else ids.to(self._device, non_blocking=True),
            read.segment_counts,
        )

    def _read(self, step: int) -> Batch:
        ids = sample_ids(self._seed, step, self._global_batch_size, self.sequences.num_sequences)
        inputs, targets, segment_ids = self.sequences.gather(ids[self._local_slice])
        return Batch(
            self._on_host(inputs),
            self._on_host(targets),
            None if segment_ids is None else self._on_host(segment_ids),
            None if segment_ids is None else (segment_ids.max(axis=1) + 1).tolist(),
        )

    def _on_host(self, array: NDArray[np.int64]) -> Tensor:
        """Return a tensor that is copied to the device while the host goes on."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        return tensor.pin_memory() if self._device.type == "cuda" else tensor

    def close(self) -> None:
        """End the reading thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)
