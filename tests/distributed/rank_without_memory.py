"""One of two ranks that save; rank 1 lacks the memory for a copy, once. Argument: a directory."""

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

ELEMENTS = 50_000_000  # of float32: 200 MB on each rank

world = start_world()
run = Path(sys.argv[1])
tensors = {f"weights.{name}": torch.full((ELEMENTS,), float(world.rank)) for name in "ab"}
with Saver(run, world, CheckpointSettings()) as saver:
    for step in (1, 2):
        limits = resource.getrlimit(resource.RLIMIT_AS)
        if step == 1 and world.rank == 1:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            used = pages * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (used + ELEMENTS, limits[1]))
        of_step = state.state_bytes(state.RunState(step=step))
        small = {"state.json": of_step, "recipe.toml": b"", "tokenizer.json": b"{}"}
        saver.start(step, tensors, small, None)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        saved = saver.wait()
        assert saved is not None
        print(f"{saved.step}: {saved.problem}", flush=True)
leave_world()
