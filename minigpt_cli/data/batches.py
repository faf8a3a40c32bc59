"""Windows of the training split -> inputs and targets on the device, one step ahead."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from minigpt_cli.data.order import sample_ids
from minigpt_cli.data.shards import TokenSplit


class Batches:
    """The batches of a run by step; while one is trained on, the next is read.

    Reading ahead keeps no state: the batch of a step depends on nothing but the step.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        seed: int,
        global_batch_size: int,
        sequence_length: int,
        share: slice,
        device: torch.device,
    ):
        """Batches of ``split``'s windows; ``share`` is the part of the global batch that this
        process trains on."""
        self.split = split
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._sequence_length = sequence_length
        self._share = share
        self._device = device
        self._windows = split.windows(sequence_length)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[Tensor]] | None = None

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """(inputs, targets) of one optimizer step, each (sequences, sequence_length) int64."""
        ahead, self._ahead = self._ahead, None
        tokens = ahead[1].result() if ahead and ahead[0] == step else self._read(step)
        self._ahead = (step + 1, self._reader.submit(self._read, step + 1))
        tokens = tokens.to(self._device, non_blocking=True)
        return tokens[:, :-1], tokens[:, 1:]

    def _read(self, step: int) -> Tensor:
        ids = sample_ids(self._seed, step, self._global_batch_size, self._windows)
        tokens = torch.from_numpy(self.split.gather(ids[self._share], self._sequence_length))
        return tokens.pin_memory() if self._device.type == "cuda" else tokens

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)
