"""Train a recipe for two steps; print the process's peak bytes above importing torch, as JSON.

    python -m tests.helpers.process_peak KIND RECIPE_TEXT VOCAB_SIZE [SECTION.KEY=VALUE...]

What pretrain does, without data, evaluation and saving. KIND is "run", or "no-heap": memory of
freed tensors then goes back to the system at once, so that the heap has no holes.
"""

import json
import re
import sys
from pathlib import Path

import torch


def high_water() -> int:
    """Return the most bytes that this process has held in memory."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


AFTER_TORCH = high_water()


def main(kind: str, text: str, vocab_size: int, settings: list[str]) -> None:
    import minigpt_cli.train.start  # what a real run imports
    from minigpt_cli.distributed.parallel import fill_own_rows
    from minigpt_cli.distributed.world import World, start_world
    from minigpt_cli.recipe import parse_recipe
    from tests.helpers.steps_of_recipe import take_steps

    assert minigpt_cli.train.start
    world = World(0, 1, torch.device("cpu")) if kind == "no-heap" else start_world()
    take_steps(parse_recipe(text, settings), vocab_size, world, fill_own_rows)
    print(json.dumps(high_water() - AFTER_TORCH))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4:])
