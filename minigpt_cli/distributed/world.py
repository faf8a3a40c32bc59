"""This process among the others: its rank, and what all ranks must agree about.

torchrun, ``--nproc`` and srun start several processes of one command; each finds its place in the
environment. Numbers on which a decision hangs travel over a group of their own on CPUs (gloo), so
that agreeing never waits for a GPU.
"""

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from minigpt_cli.core.console import error_line
from minigpt_cli.core.errors import (
    Diverged,
    Outcome,
    RankLost,
    Stopped,
    UserError,
    describe,
    exit_code_of,
)
from minigpt_cli.distributed import rendezvous
from minigpt_cli.distributed.device import find_device
from minigpt_cli.distributed.workers import RESUME

T = TypeVar("T")
_FAILURE, _LEFT = "failure", "left"  # the store's keys: what ended the run first; ranks that ended
_ANSWER = 5.0  # seconds that a rank which ends waits for an answer of the store
_NOTICE = 2.0  # seconds in which most ranks notice by themselves that another one has failed
_FOR_EVER = timedelta(days=365)
_OF_TORCH = ("gloo", "nccl", "connection", "broken pipe", "timed out")  # in a lost rank's errors


@dataclass(frozen=True)
class World:
    """This process: its rank, how many ranks there are, and the device it computes on."""

    rank: int
    size: int
    device: torch.device
    local_size: int = 1  # ranks on this machine
    control: dist.ProcessGroup | None = None  # for decisions, on CPUs; None in a single process
    saving: dist.ProcessGroup | None = None  # for checkpoints, written while others talk

    def all_reduce_max(self, *values: int) -> list[int]:
        """The largest of each value over all ranks: a flag that one rank raises, all see."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Add up a tensor on the device over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather_json(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Every rank's value (something JSON can hold), by rank."""
        if self.size == 1:
            return [value]
        group = group or self.control
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(own)]), group=group)
        longest = max(int(size) for size in sizes)
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
        padded = torch.nn.functional.pad(own, (0, longest - len(own)))
        dist.all_gather(parts, padded, group=group)
        return [
            json.loads(part[: int(size)].numpy().tobytes())
            for part, size in zip(parts, sizes, strict=True)
        ]

    def run_on_rank0(self, make: Callable[[], T]) -> T:
        """What ``make`` gives on rank 0 (something JSON can hold), on every rank.

        It may take hours: the others ask for it now and then, where a collective would time out.
        """
        if self.size == 1:
            return make()
        store, key = _joined.store, f"from-first/{_joined.next_key()}"
        assert store is not None
        if self.rank == 0:
            value = make()
            store.set(key, json.dumps(value))
            return value
        patience = store.timeout.total_seconds()
        try:
            while not rendezvous.within(patience, lambda: store.check([key])):
                time.sleep(0.05)
        except TimeoutError:
            raise _lost("rank 0", "no answer") from None
        made: T = json.loads(store.get(key))
        return made


class _Joined:
    """What this process knows of the others before and beside any World: one store."""

    store: dist.Store | None = None
    place: rendezvous.Place | None = None
    world: World | None = None
    outcome: Outcome | None = None
    told: Outcome | None = None  # how the first rank that failed ends all, once that is known
    record: Callable[[Outcome], None] | None = None
    keys: int = 0

    def next_key(self) -> int:
        self.keys += 1
        return self.keys


_joined = _Joined()


def join() -> None:
    """Meet the other ranks, where there are any: from here on errors are shown once.

    Raises:
        UserError: their meeting point can't be reached.
    """
    if _joined.store is None and (place := rendezvous.find_place()) is not None:
        _joined.place = place
        _joined.store = rendezvous.connect(place)
        # A store of its own: one that is waited for answers nothing else.
        watch = threading.Thread(target=_watch, args=(_joined.store.clone(),), daemon=True)
        watch.start()


def _watch(store: dist.Store) -> None:
    """End this process soon after another rank has failed.

    Mostly a rank notices by itself, when the other's connection closes; but not while it still
    waits for that one to come, nor in the middle of a collective of NCCL.
    """
    try:
        store.wait([_FAILURE], _FOR_EVER)
        told = _joined.told = _told(store.get(_FAILURE))
    except Exception:  # the store has gone
        told = None
    time.sleep(_NOTICE)
    if _joined.outcome is not None:
        return
    _joined.store = store  # the main thread may be waiting for the other one
    outcome = told or end_with(_lost("rank 0", "it has ended without a word"))
    if _joined.record is not None:
        _joined.record(outcome)
    if outcome.is_shown_here:
        error_line(outcome.message)
    leave_world(patience=4)
    os._exit(outcome.code)


def start_world(timeout_minutes: float = 10.0) -> World:
    """This process's World; the same one however often it is asked for.

    Args:
        timeout_minutes: how long a collective waits for a rank that doesn't answer.
    """
    if _joined.world is not None:
        return _joined.world
    join()
    place, store = _joined.place, _joined.store
    if place is None or store is None:
        world = World(rank=0, size=1, device=find_device())
    else:
        device = find_device(place.local_rank, place.local_size)
        timeout = timedelta(minutes=timeout_minutes)
        store.set_timeout(max(timeout, timedelta(minutes=10)))
        rendezvous.wait_for_all(place, store)
        rendezvous.choose_interface(place, store)
        try:
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=dist.PrefixStore("groups", store),
                rank=place.rank,
                world_size=place.size,
                timeout=timeout,
                device_id=device if device.type == "cuda" else None,
            )
        except dist.DistBackendError as error:
            if "Duplicate GPU" not in str(error):
                raise
            raise UserError(
                f"several processes on this machine were given one GPU; it has "
                f"{torch.cuda.device_count()} for as many processes (--nproc)"
            ) from None
        world = World(
            rank=place.rank,
            size=place.size,
            device=device,
            local_size=place.local_size,
            control=dist.new_group(backend="gloo", timeout=timeout),
            # Disks may be slow, and slower for one rank than for another.
            saving=dist.new_group(backend="gloo", timeout=max(timeout, timedelta(hours=1))),
        )
    _joined.world = world
    return world


def leave_world(patience: float = 0) -> None:
    """Part from the other ranks at the end; rank 0, which keeps the store, goes last.

    Args:
        patience: seconds that rank 0 waits for the others.
    """
    store, place = _joined.store, _joined.place
    if store is None or place is None:
        return
    with contextlib.suppress(Exception):  # all is said: nothing here may fail it
        rendezvous.within(_ANSWER, lambda: store.add(_LEFT, 1))
        deadline = time.monotonic() + patience
        while place.rank == 0 and time.monotonic() < deadline:
            if store.add(_LEFT, 0) == place.size:
                return
            time.sleep(0.02)


def is_rank0() -> bool:
    """Whether this is the process that speaks for all: rank 0, or the only one."""
    return _joined.place is None or _joined.place.rank == 0


def own_rank() -> int:
    return _joined.place.rank if _joined.place else 0


def end_with(error: BaseException) -> Outcome:
    """How this process ends because of an error: as the first rank did that failed.

    The others learn of it. Where the store has gone, or can't be reached, one rank on each machine
    shows its own message.
    """
    place = _joined.place
    if place is None:
        return Outcome(exit_code_of(error), describe(error))
    if _joined.outcome is None:
        _joined.outcome = _announced(error, place)
    return _joined.outcome


def _announced(error: BaseException, place: rendezvous.Place) -> Outcome:
    message, store = describe(error), _joined.store
    if is_lost_rank(error) and not isinstance(error, RankLost):
        first_sentence = re.match(r"\s*(?:\[\S+\] )?(.*?)(?:\. |$)", str(error), re.MULTILINE)
        reason = first_sentence[1] if first_sentence else type(error).__name__
        message = str(_lost("another rank", reason))
    if place.rank and not isinstance(error, (Stopped, Diverged)):
        message = f"rank {place.rank}: {message}"
    if store is None:
        return Outcome(exit_code_of(error), message)
    own = {"rank": place.rank, "code": exit_code_of(error), "message": message}
    try:
        return _told(
            rendezvous.within(_ANSWER, lambda: store.compare_set(_FAILURE, "", json.dumps(own)))
        )
    except Exception:
        _joined.store = None
        if _joined.told is not None:
            return _joined.told
        speaks = place.local_rank == 0 or place.rank == 1  # rank 1 where rank 0 can't any more
        return Outcome(exit_code_of(error), message, is_shown_here=speaks)


def _told(failure: bytes) -> Outcome:
    """What the store holds of the first rank that failed, as the outcome of this one."""
    first = json.loads(failure)
    return Outcome(first["code"], first["message"], is_shown_here=first["rank"] == own_rank())


@contextlib.contextmanager
def recorded_by(record: Callable[[Outcome], None]) -> Iterator[None]:
    """Call ``record`` if in the ``with`` block this process ends because of another rank and its
    main thread hasn't noticed; just before it ends, in another thread."""
    _joined.record = record
    try:
        yield
    finally:
        _joined.record = None


def _lost(who: str, reason: str) -> RankLost:
    return RankLost(f"the connection to {who} is lost ({reason}); {RESUME}")


def is_lost_rank(error: BaseException) -> bool:
    """Whether this error says that another rank doesn't answer any more."""
    if isinstance(error, RankLost):
        return True
    text = str(error).lower()
    return _joined.place is not None and (
        isinstance(error, dist.DistError)
        or (isinstance(error, RuntimeError) and any(word in text for word in _OF_TORCH))
    )
