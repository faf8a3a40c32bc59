"""Checkpoints that a disk has damaged: flipped bits, cuts, losses.

Each is refused by ``verify`` and by ``resume`` of the checkpoint itself, with exit code 4; and
``resume`` of the run says so and goes on from the checkpoint before, to the same end.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.scene import STEPS, TWO_RANKS, Scene, copy_of, newest

Change = Callable[[Path], object]  # of a checkpoint, in its directory


@dataclass(frozen=True)
class Damage:
    name: str
    do: Change
    says: str  # what must be in the message


def try_damage(scene: Scene, damage: Damage, resume: bool = True) -> None:
    """Damage the newest checkpoint of a finished run, which must be refused.

    Args:
        resume: try all commands that read it, and go on from the checkpoint before.
    """
    run = copy_of(scene.straight(), scene.place("damaged"))
    checkpoint = newest(run)
    damage.do(checkpoint)
    ways = [("verify", run), ("verify", checkpoint), ("resume", checkpoint), ("sample", checkpoint)]
    for arguments in ways if resume else ways[:1]:
        code, said = scene.do(*arguments)
        told = said.splitlines()[-1] if said else ""
        context = f"{damage.name}: {arguments[0]} ended with {code}: {said}"
        assert code == 4, context
        assert told.startswith("minigpt: "), context
        assert checkpoint.name in told, context
        assert damage.says in told, context
        assert "Traceback" not in said, context
    if resume:
        code, said = scene.do(*scene.go(run))
        assert code == 0, f"{damage.name}: {said}"
        (warning,) = (line for line in said.splitlines() if "skipped" in line)
        assert warning.startswith(f"warning: {checkpoint.name} skipped: "), warning
        assert damage.says in warning, warning
        assert f"resuming {run} from step {STEPS - 1} of {STEPS}" in said
        assert checkpoint.with_name(f"{checkpoint.name}.aside-1").exists()
        scene.check_same(run)
    assert not scene.canary.exists(), f"{damage.name}: something in it was executed"
    shutil.rmtree(run)


def damage_everything(scene: Scene) -> None:
    """Where no checkpoint is left the run isn't begun anew over what might yet be mended."""
    run = copy_of(scene.straight(), scene.place("damaged"))
    for checkpoint in (run / "checkpoints").glob("step-*"):
        _flip("state.json", 7, 1)(checkpoint)
    before = sorted(path for path in run.rglob("*") if path.name != ".lock")
    for arguments in (scene.go(run), ["verify", run]):
        code, said = scene.do(*arguments)
        assert code == 4, said
        assert said.splitlines()[-1].startswith("minigpt: "), said
        assert said.count("state.json: its content is not what was written") == 3, said
    assert sorted(path for path in run.rglob("*") if path.name != ".lock") == before


def damage_before_two_ranks(scene: Scene) -> None:
    """Each rank verifies some of the files; what one finds damaged, both pass over."""
    straight = scene.straight(*TWO_RANKS, ranks=2)
    for file in sorted(path.name for path in newest(straight).glob("shard-*")):
        run = copy_of(straight, scene.place("damaged"))
        _cut(file, 9)(newest(run))
        first, _ = scene.finish(run, *TWO_RANKS, ranks=2)
        assert f"step-{STEPS:08d} skipped: " in first.said, first.tail
        assert f"{file}: 9 bytes, " in first.said, first.tail


def accidents(chance: random.Random, checkpoint: Path, times: int) -> Iterator[Damage]:
    """For each file: bits flipped and the end cut off, at both ends and at random places."""
    for file in sorted(path.name for path in checkpoint.iterdir()):
        size = (checkpoint / file).stat().st_size
        for place in [size - 1, 0, *(chance.randrange(size) for _ in range(times - 2))][:times]:
            bit = 1 << chance.randrange(8)
            yield Damage(f"bit {bit} of byte {place} of {file}", _flip(file, place, bit), file)
        for length in [size - 1, 0, *(chance.randrange(size) for _ in range(times - 2))][:times]:
            yield Damage(f"{file} cut to {length} bytes", _cut(file, length), file)
        yield Damage(f"{file} is missing", _delete(file), file)
        yield Damage(f"{file} has a page of zeros", _zeros(file, chance.randrange(size)), file)
        yield Damage(f"{file} is longer", _append(file), file)


def _flip(file: str, place: int, bit: int) -> Change:
    def do(checkpoint: Path) -> None:
        content = bytearray((checkpoint / file).read_bytes())
        content[place] ^= bit
        (checkpoint / file).write_bytes(content)

    return do


def _cut(file: str, length: int) -> Change:
    return lambda checkpoint: os.truncate(checkpoint / file, length)


def _delete(file: str) -> Change:
    return lambda checkpoint: (checkpoint / file).unlink()


def _append(file: str) -> Change:
    return lambda checkpoint: (checkpoint / file).open("ab").write(b"\0")


def _zeros(file: str, place: int) -> Change:
    def do(checkpoint: Path) -> None:
        content = (checkpoint / file).read_bytes()
        length = min(4096, len(content) - place)
        zeros = bytes(length)
        if content[place : place + length] == zeros:
            zeros = b"\1" * length
        (checkpoint / file).write_bytes(content[:place] + zeros + content[place + length :])

    return do
