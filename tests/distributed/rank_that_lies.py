"""One of two ranks; rank 1 sends what no rank sends. Rank 0 prints how each exchange ended."""

import json
from typing import Any

import torch
import torch.distributed as dist

from minigpt_cli.core.errors import RankLost
from minigpt_cli.distributed.join import leave_world, session
from minigpt_cli.distributed.world import World, start_world

CONTENTS = [
    b'"honest"', b"", b"{", b"\xff\xfe", b"null", b"3", b'["a"]', b'{"a": "b"}', b"[" * 100_000,
]  # fmt: skip
SIZES = [0, -1, 2**40, -(2**63)]


def send(world: World, content: bytes, size: int | None = None) -> None:
    """What all_gather_json does, without its care."""
    size = len(content) if size is None else size
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(sizes, torch.tensor([size]), group=world.control)
    lengths = [int(each) for each in sizes]
    if min(lengths) <= 0 or max(lengths) > 2**30:
        return
    parts = [torch.zeros(max(lengths), dtype=torch.uint8) for _ in range(2)]
    own = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    padded = torch.nn.functional.pad(own, (0, max(lengths) - len(own)))
    dist.all_gather(parts, padded, group=world.control)


def receive(world: World) -> Any:
    try:
        return world.all_gather_json("own", str)[1]
    except RankLost as error:
        return str(error)


world = start_world()
assert session.store is not None
said = []
for content in CONTENTS:
    said.append(receive(world)) if world.rank == 0 else send(world, content)
for size in SIZES:
    said.append(receive(world)) if world.rank == 0 else send(world, b"", size)
if world.rank == 0:  # it lies too
    for content in CONTENTS[2:]:
        dist.broadcast(torch.tensor([len(content)]), 0, group=world.control)
        sent = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(sent, 0, group=world.control)
    for size in SIZES:
        dist.broadcast(torch.tensor([size]), 0, group=world.control)
else:
    for _ in range(len(CONTENTS[2:]) + len(SIZES)):
        try:
            said.append(world.broadcast_json("", str))
        except RankLost as error:
            said.append(str(error))
if world.rank == 1:  # it takes rank 0's place
    for number, content in enumerate(CONTENTS[2:]):
        session.store.set(f"minigpt/run-on-rank0/{number}", content)
        try:
            said.append(world.run_on_rank0(lambda: "", str))
        except RankLost as error:
            said.append(str(error))
print(json.dumps(said), flush=True)
leave_world(patience=30)
