"""Save on each GPU, both ways; print how many numbers in the files are wrong, as JSON."""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open

from minigpt_cli.checkpoint.saver import Saver
from minigpt_cli.distributed.world import World
from minigpt_cli.recipe import CheckpointSettings


def wrong_numbers(run: Path, device: torch.device, asynchronous: bool, value: float) -> int:
    tensors = {name: torch.full((500, 1000), value).to(device) for name in ("a", "b")}
    torch.cuda.synchronize()
    world = World(rank=0, size=1, device=device)
    with Saver(run, world, CheckpointSettings(asynchronous=asynchronous)) as saver:
        saver.start(1, tensors, {}, None)
        saved = saver.wait()
    assert saved is not None
    assert saved.problem is None
    wrong = 0
    for file in saved.path.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            names = stored.keys()
            wrong += sum(int((stored.get_tensor(name) != value).sum()) for name in names)
    return wrong


found = {}
for index in range(torch.cuda.device_count()):
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    for number, asynchronous in enumerate((False, True)):
        name = f"cuda:{index}, asynchronous={asynchronous}"
        run = Path(sys.argv[1]) / f"{index}-{number}"
        run.mkdir()
        found[name] = wrong_numbers(run, device, asynchronous, 1.0 + 2 * index + number)
print(json.dumps(found))
