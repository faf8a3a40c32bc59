"""Two processes in one run directory: one trains, the others are refused and touch nothing."""

import random
import signal
import time
from pathlib import Path

from tests.faults.scene import TWO_RANKS, Scene
from tests.helpers.processes import Process
from tests.helpers.runs import steps_logged, steps_saved
from tests.helpers.waiting import wait_until

BUSY = "another process is training in it"
ENDLESS = ("train.steps=100000", "eval.every_steps=100000")


def refuse_others(scene: Scene, chance: random.Random, times: int, nproc: bool = False) -> int:
    """While one trains, and in its saves, others that come by every way in are refused.

    Args:
        nproc: two more come, with ``--nproc 2``.

    Returns:
        How many were refused while the first was in a save.
    """
    run = scene.place("shared")
    first = scene.fork(*scene.go(run, *ENDLESS))
    wait_until(lambda: len(steps_saved(run)) > 1, first)
    in_saves = 0
    for number in range(times):
        ways = [
            ["resume", run],
            ["resume", run / "checkpoints"],
            scene.go(run, *ENDLESS),
            ["resume", run, "--set", "train.steps=7"],
        ]
        if chance.random() < 0.5:
            wait_until(lambda: list((run / "checkpoints").glob(".writing-*")), first)
        second = scene.fork(*ways[number % len(ways)])
        _check_refused(second, run)
        in_saves += bool(list((run / "checkpoints").glob(".writing-*")))
    if nproc:
        _check_refused(scene.fork("resume", run, "--nproc", 2), run)
    before = steps_logged(run)
    wait_until(lambda: steps_logged(run) > before + 3, first)
    assert first.code is None, first.tail
    assert "warning" not in first.said, first.tail
    first.send(signal.SIGTERM)
    assert first.wait(30) == 75, first.tail
    _go_on(scene, run)
    return in_saves


def _check_refused(second: Process, run: Path) -> None:
    said_before = (run / "status.json").read_bytes()
    recipe = (run / "recipe.toml").read_bytes()
    assert second.wait() == 2, second.tail
    assert second.said.splitlines()[-1] == f"minigpt: {run}: {BUSY}", second.tail
    assert "Traceback" not in second.said
    assert (run / "status.json").read_bytes() == said_before
    assert (run / "recipe.toml").read_bytes() == recipe


def _go_on(scene: Scene, run: Path) -> None:
    """Once the first has left, the directory is free: the last steps are made, and nothing else."""
    steps = steps_logged(run) + 3
    code, said = scene.do("resume", run, "--set", f"train.steps={steps}")
    assert code == 0, said
    assert f"finished at step {steps}" in said


def start_at_once(scene: Scene, chance: random.Random) -> None:
    """Two start the same run at the same moment: one makes it, whole, and the other is refused."""
    run = scene.place("shared")
    both = [scene.fork(*scene.go(run))]
    time.sleep(chance.random() * 0.1)
    both.append(scene.fork(*scene.go(run)))
    codes = sorted(each.wait() for each in both)
    said = "\n".join(each.said for each in both)
    assert codes in ([0, 2], [0, 0]), said  # both, where the second came when it was done
    assert codes == [0, 0] or BUSY in said or "already holds a run" in said, said
    scene.check_same(run)


def refuse_others_in_preparation(scene: Scene) -> None:
    """The first is still making the token dataset."""
    run = scene.place("shared")
    settings = (f"data.path={run}/data",)
    first = scene.fork(*scene.go(run, *settings))
    wait_until(lambda: (run / "data/.lock").exists(), first)
    with first.stopped():
        assert not (run / "data/dataset.json").exists(), "it has made the dataset already"
        second = scene.fork(*scene.go(run, *settings))
        assert second.wait() == 2, second.tail
        told = second.said.splitlines()[-1]
        assert told == f"minigpt: {run}: another process is training in it", told
    assert first.wait() == 0, first.tail
    scene.check_same(run)


def refuse_while_ranks_train(scene: Scene) -> None:
    """The first is ``--nproc 2``; one process, and two more, come."""
    run = scene.place("shared")
    settings = (*TWO_RANKS, *ENDLESS)
    first = scene.fork(*scene.go(run, *settings), "--nproc", 2)
    wait_until(lambda: len(steps_saved(run)) > 1, first)
    _check_refused(scene.fork("resume", run), run)
    _check_refused(scene.fork("resume", run, "--nproc", 2), run)
    assert first.code is None, first.tail
    first.send(signal.SIGTERM)
    assert first.wait(30) == 75, first.tail
