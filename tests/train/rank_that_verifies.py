"""One of two ranks that verify a dataset several times. Argument: a directory with ``data``.

Prints a JSON line for each time: the files that this rank has read, and the error. The last error
ends it.
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from minigpt_cli import cli
from minigpt_cli.commands.launching import join_ranks
from minigpt_cli.core.errors import UserError
from minigpt_cli.data import file_checks
from minigpt_cli.distributed.world import World, start_world
from minigpt_cli.train.data_check import verify_on_each_storage

read: list[str] = []
world: World


def note_shards(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and str(arguments[0]).endswith(".npy"):
        read.append(Path(str(arguments[0])).name)


def verify(path: Path) -> None:
    read.clear()
    error: list[object] = []
    try:
        states = verify_on_each_storage(path, world)
        assert len(states) == 4
    except UserError as problem:
        error = [problem.exit_code, str(problem)]
    print(json.dumps({"read": sorted(set(read)), "error": error}), flush=True)


def flip(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([byte ^ 1]))


@cli.app.command()
def check() -> None:
    global world
    join_ranks()
    world = start_world()
    time.sleep(0.3 * world.rank)
    assert world.all_gather_when_done([world.rank], list[int]) == [[0], [1]]

    data, own = folder / "data", folder / f"machine-{world.rank}"
    verify(data)
    verify(data)
    world.run_on_rank0(lambda: flip(data / "train-00001.npy"))
    verify(data)
    world.run_on_rank0(lambda: flip(data / "train-00001.npy"))
    verify(data)

    # Copies on two machines; here each has another path.
    shutil.copytree(data, own)
    world.run_on_rank0(lambda: None)
    verify(own)
    verify(own)
    if world.rank:
        flip(own / "train-00002.npy")
    verify(own)
    if world.rank == 0:
        shutil.copytree(folder / "other", own, dirs_exist_ok=True)
    verify(own)

    world.run_on_rank0(lambda: flip(data / "train-00003.npy"))
    verify_on_each_storage(data, world)


folder = Path(sys.argv.pop(1))
file_checks._SETTLED_NS = -(10**12)  # the files have just been made
sys.addaudithook(note_shards)
cli.main()
