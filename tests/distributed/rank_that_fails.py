"""One of two ranks; where argv says, rank 1 has an error of its own."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minigpt_cli import cli
from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.commands.launching import join_ranks
from minigpt_cli.core.errors import UserError
from minigpt_cli.distributed import failure
from minigpt_cli.distributed.failure import announce_failure, record_status
from minigpt_cli.distributed.join import own_rank, session
from minigpt_cli.distributed.world import World, start_world

when = sys.argv.pop(1)


@cli.app.command()
def fail() -> None:
    join_ranks()
    if when == "before":
        fail_on_rank_1()
    world = start_world(run=Path("runs/x"))
    assert world.all_gather_json(world.rank, int) == [0, 1]
    if when == "waiting":
        world.run_on_rank0(lambda: wait_for_ever(fail_on_rank_1 if world.rank else None))
    world.all_reduce_max(1)
    if when == "shared":  # rank 1 meets it first
        time.sleep(0.2 * (1 - world.rank))
        raise UserError("the disk of all is gone")
    if when == "between":
        fail_on_rank_1()
    if when == "open":  # rank 1 has asked, rank 0 never does
        world.rank and world.start_all_reduce_max(lambda: (1,))
        fail_on_rank_1()
        threading.Event().wait()
    if when == "hangs":
        hang_on_rank_1(world)
    if when == "dies":
        world.rank or os.kill(os.getpid(), signal.SIGKILL)
        threading.Event().wait()
    if when == "told":
        tell_and_die(Path("heard")) if world.rank == 0 else fail_when_it_is_gone(Path("heard"))
    if when == "bug" and world.rank == 1:
        raise ZeroDivisionError("a bug")
    while True:
        world.all_reduce_max(1)


def fail_on_rank_1() -> None:
    if own_rank() == 1:
        raise UserError("the disk of this one is gone")


def hang_on_rank_1(world: World) -> None:
    """It fails but doesn't end, so that the other waits for it in a collective."""
    if world.rank == 1:
        announce_failure(UserError("the GPU of this one is gone"))
        threading.Event().wait()
    with record_status(Path.cwd()) as record:
        record.state = RunState(step=7)
        world.all_reduce_max(1)


def tell_and_die(heard: Path) -> None:
    """Rank 0 says why it fails and is gone, and the store with it, before rank 1 ends."""
    announce_failure(UserError("the GPU of this one is gone"))
    while not heard.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def fail_when_it_is_gone(heard: Path) -> None:
    while failure._failure.heard is None:
        time.sleep(0.01)
    heard.touch()
    assert session.store is not None
    with contextlib.suppress(Exception):
        while True:
            session.store.check(["x"])
    raise UserError("a connection is gone")


def wait_for_ever(_: Callable[[], Any] | None) -> None:
    raise UserError("the data can't be made")


cli.main()
