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
from minigpt_cli.distributed import world as worlds
from minigpt_cli.errors import UserError
from minigpt_cli.train.status import recorded

when = sys.argv.pop(1)


@cli.app.command()
def fail() -> None:
    cli._join()
    if when == "before":
        fail_on_rank_1()
    world = worlds.start()
    assert world.gather(world.rank) == [0, 1]
    if when == "waiting":
        world.from_first(lambda: wait_for_ever(fail_on_rank_1 if world.rank else None))
    world.largest(1)
    if when == "between":
        fail_on_rank_1()
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
        world.largest(1)


def fail_on_rank_1() -> None:
    if worlds.rank() == 1:
        raise UserError("the disk of this one is gone")


def hang_on_rank_1(world: worlds.World) -> None:
    """It fails but doesn't end, so that the other waits for it in a collective."""
    if world.rank == 1:
        worlds.end_with(UserError("the GPU of this one is gone"))
        threading.Event().wait()
    with recorded(Path.cwd()) as record:
        record.state = RunState(step=7)
        world.largest(1)


def tell_and_die(heard: Path) -> None:
    """Rank 0 says why it fails and is gone, and the store with it, before rank 1 ends."""
    worlds.end_with(UserError("the GPU of this one is gone"))
    while not heard.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def fail_when_it_is_gone(heard: Path) -> None:
    while worlds._joined.told is None:
        time.sleep(0.01)
    heard.touch()
    assert worlds._joined.store is not None
    with contextlib.suppress(Exception):
        while True:
            worlds._joined.store.check(["x"])
    raise UserError("a connection is gone")


def wait_for_ever(_: Callable[[], Any] | None) -> None:
    raise UserError("the data can't be made")


cli.main()
