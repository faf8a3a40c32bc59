"""Sequences of a split -> inputs and targets on the device, one step ahead."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt_cli.data.dataset import TokenSplit
from minigpt_cli.data.order import sample_ids
from minigpt_cli.data.packing import PackedSequences

Gathered = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64] | None]


@dataclass(frozen=True)
class TokenSequences:
    """A split of a token dataset, cut into rows of ``sequence_length`` predicted tokens."""

    split: TokenSplit
    sequence_length: int

    @property
    def num_sequences(self) -> int:
        """The number of rows."""
        return self.split.num_sequences(self.sequence_length)

    def gather(self, ids: NDArray[np.int64]) -> Gathered:
        """Inputs and targets, each int64 [n, sequence_length], of the rows with these numbers."""
        tokens = self.split.gather(ids, self.sequence_length)
        return tokens[:, :-1], tokens[:, 1:], None


Sequences = TokenSequences | PackedSequences


class Batch(NamedTuple):
    """This process's share of one optimizer step: each (sequences, T) int64 on the device."""

    inputs: Tensor
    targets: Tensor  # -100 counts for nothing
    segment_ids: Tensor | None  # the examples of each row by number, which don't see one another


class BatchLoader:
    """The batches of a run by step; while one is trained on, the next is read.

    Reading ahead keeps no state: the batch of a step depends on nothing but the step.
    """

    def __init__(
        self,
        rows: Sequences,
        *,
        seed: int,
        global_batch_size: int,
        share: slice,
        device: torch.device,
    ):
        """Batches of ``rows``; ``share`` is this rank's slice of the global batch."""
        self.rows = rows
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._share = share
        self._device = device
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[list[Tensor]]] | None = None

    def __call__(self, step: int) -> Batch:
        """What one optimizer step trains on."""
        ahead, self._ahead = self._ahead, None
        read = ahead[1].result() if ahead and ahead[0] == step else self._read(step)
        self._ahead = (step + 1, self._reader.submit(self._read, step + 1))
        inputs, targets, *segment_ids = (each.to(self._device, non_blocking=True) for each in read)
        return Batch(inputs, targets, segment_ids[0] if segment_ids else None)

    def _read(self, step: int) -> list[Tensor]:
        ids = sample_ids(self._seed, step, self._global_batch_size, self.rows.num_sequences)
        gathered = self.rows.gather(ids[self._share])
        # In one piece each, or the copy to a GPU would not be an asynchronous one.
        tensors = [
            torch.from_numpy(np.ascontiguousarray(each)) for each in gathered if each is not None
        ]
        on_gpu = self._device.type == "cuda"
        return [each.pin_memory() for each in tensors] if on_gpu else tensors

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)
