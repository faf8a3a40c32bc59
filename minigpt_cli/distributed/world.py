"""This process among the others: its rank, its device, and the collectives for decisions.

Numbers on which a decision depends travel over a group of their own on CPUs (gloo), so that
agreeing never waits for a GPU.
"""

import itertools
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.reading import parse_form
from minigpt_cli.distributed.device import find_device
from minigpt_cli.distributed.failure import rank_lost, set_run_directory, start_watch
from minigpt_cli.distributed.join import (
    call_with_timeout,
    choose_interface,
    connect,
    session,
    wait_for_all,
)
from minigpt_cli.distributed.rank_info import RankInfo, find_rank_info

T = TypeVar("T")
_LONGEST = 2**26  # bytes of a rank's value; far more than any has
_FOREIGN = "it sent an invalid message"
_calls = itertools.count()  # of run_on_rank0: all ranks make the same ones
_world: "World | None" = None


@dataclass(frozen=True)
class World:
    """This process's place among the ranks, and the collectives that ranks agree by."""

    rank: int
    size: int
    device: torch.device
    local_size: int = 1  # number of ranks on this machine
    control: dist.ProcessGroup | None = None  # for decisions, on CPUs; None in a single process
    saving: dist.ProcessGroup | None = None  # for checkpoints, written while training goes on

    def all_reduce_max(self, *values: int) -> list[int]:
        """Return the maximum of each value over all ranks: all see a flag that one rank raises."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor on the device over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather_json(
        self, value: T, form: Any, group: dist.ProcessGroup | None = None
    ) -> list[T]:
        """Return every rank's value, by rank.

        Args:
            value: anything that JSON holds.
            form: what a rank may send; see ``build`` of core/reading.py.
            group: the ranks; by default those of ``control``.

        Raises:
            RankLost: a rank sent something else.
        """
        if self.size == 1:
            return [value]
        group = group or self.control
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=group)
        lengths = [int(size) for size in sizes]
        for rank, length in enumerate(lengths):
            if not 0 < length <= _LONGEST:
                raise rank_lost(f"rank {rank}", _FOREIGN)
        longest = max(lengths)
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        padded = torch.nn.functional.pad(own, (0, longest - len(own)))
        dist.all_gather(parts, padded, group=group)
        return [
            _parse(part[:length].numpy().tobytes(), form, rank)
            for rank, (part, length) in enumerate(zip(parts, lengths, strict=True))
        ]

    def run_on_rank0(self, function: Callable[[], T], form: Any = None) -> T:
        """Return what ``function`` returns on rank 0, on every rank.

        It may take hours: the others ask the store now and then, where a collective would time out.

        Args:
            function: returns anything that JSON holds.
            form: what it returns; see ``build`` of core/reading.py.

        Raises:
            RankLost: rank 0 doesn't answer, or sent something else.
        """
        if self.size == 1:
            return function()
        store = session.store
        assert store is not None
        key = f"minigpt/run-on-rank0/{next(_calls)}"
        if self.rank == 0:
            value = function()
            store.set(key, json.dumps(value))
            return value
        try:
            while not call_with_timeout(store.timeout.total_seconds(), lambda: store.check([key])):
                time.sleep(0.05)
        except TimeoutError:
            raise rank_lost("rank 0", "no answer") from None
        returned: T = _parse(store.get(key), form, 0)
        return returned


def _parse(content: bytes, form: Any, rank: int) -> Any:
    try:
        return parse_form(content, form)
    except ValueError:
        raise rank_lost(f"rank {rank}", _FOREIGN) from None


def join(info: RankInfo) -> None:
    """Meet the other ranks: from here on an error is shown once.

    Raises:
        UserError: the store can't be reached.
    """
    session.info = info
    session.store = connect(info)
    start_watch()


def start_world(
    timeout_minutes: float = 10.0, run: Path | None = None, deterministic: bool = True
) -> World:
    """Return this process's World; the same one at each call.

    Args:
        timeout_minutes: how long a collective waits for a rank that doesn't answer.
        run: the run directory, for messages about a lost rank.
        deterministic: whether sums over GPUs must have the same bits in each call.
    """
    global _world
    if run is not None:
        set_run_directory(run)
    if _world is None:
        if session.store is None and (found := find_rank_info()) is not None:
            join(found)
        info, store = session.info, session.store
        if info is None or store is None:
            _world = World(rank=0, size=1, device=find_device())
        else:
            if deterministic:
                # Sums by NVLink's switches differ between calls (NVIDIA/nccl#1497). NCCL reads this
                # when it starts.
                os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
            _world = _start_groups(info, store, timedelta(minutes=timeout_minutes))
    return _world


def _start_groups(info: RankInfo, store: dist.Store, timeout: timedelta) -> World:
    device = find_device(info.local_rank, info.local_size)
    store.set_timeout(max(timeout, timedelta(minutes=10)))
    wait_for_all(info, store)
    choose_interface(info, store)
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("groups", store),
            rank=info.rank,
            world_size=info.size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except dist.DistBackendError as error:
        if "Duplicate GPU" not in str(error):
            raise
        raise UserError(
            f"{info.local_size} processes on this machine, but each needs a GPU of its own, and "
            f"there are {torch.cuda.device_count()}: start fewer (--nproc)"
        ) from None
    return World(
        rank=info.rank,
        size=info.size,
        device=device,
        local_size=info.local_size,
        control=dist.new_group(backend="gloo", timeout=timeout),
        # Disks may be slow, and slower for one rank than for another.
        saving=dist.new_group(backend="gloo", timeout=max(timeout, timedelta(hours=1))),
    )
