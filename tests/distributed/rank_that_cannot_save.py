"""One of two ranks that save. Arguments: a directory, then what rank 1 lacks at step 1, 2, ...

memory     it has none for a copy, of an asynchronous save
disk       it can't write a file whole
tensor     it passes one tensor less than rank 0
nothing
"""

import os
import resource
import sys
from pathlib import Path

import torch

from minigpt_cli.checkpoint import state
from minigpt_cli.checkpoint.saver import Saver
from minigpt_cli.distributed.join import leave_world
from minigpt_cli.distributed.world import start_world
from minigpt_cli.recipe import CheckpointSettings
from tests.helpers.file_limit import limit_files

ELEMENTS = 20_000_000  # of float32: 160 MB on each rank

world = start_world()
run, lacks = Path(sys.argv[1]), sys.argv[2:]
whole = {f"weights.{name}": torch.full((ELEMENTS,), float(world.rank)) for name in "ab"}
with Saver(run, world, CheckpointSettings(asynchronous=run.name != "sync")) as saver:
    for step, lack in enumerate(lacks, 1):
        limits, tensors = resource.getrlimit(resource.RLIMIT_AS), dict(whole)
        if world.rank == 0:
            lack = "nothing"
        if lack == "memory":
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            used = pages * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + ELEMENTS, limits[1]))
        if lack == "disk":
            limit_files(1_000_000)
        if lack == "tensor":
            del tensors["weights.b"]
        of_step = state.state_bytes(state.RunState(step=step))
        small = {"state.json": of_step, "recipe.toml": b"", "tokenizer.json": b"{}"}
        saver.start(step, tensors, small, None)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        saved = saver.wait()
        limit_files(None)
        assert saved is not None
        print(f"{saved.step}: {saved.problem}", flush=True)
leave_world()
