"""SIGKILL at random moments, many of them in saves: one process, two ranks, ``--nproc 2``."""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

from tests.faults.scene import STEPS, TWO_RANKS, Scene, check_nothing_lost
from tests.helpers.processes import Process, ranks
from tests.helpers.runs import steps_logged, steps_saved
from tests.helpers.waiting import wait_until


def kill_processes(
    scene: Scene, chance: random.Random, kills: int, *settings: str, size: int = 1
) -> Counter[str]:
    """Kill a run of one process, or of ``size`` ranks, and go on with it, until so many kills.

    A run that comes to its end must have come to that of the uninterrupted one; the next begins.

    Returns:
        How many kills hit what.
    """
    hit: Counter[str] = Counter()
    while hit.total() < kills:
        run = scene.place("killed")
        while hit.total() < kills:
            saved = steps_saved(run)
            started = scene.start(size, run, *settings)
            if size > 1:
                # Before that, a rank that is dead can't be told from one that comes late; launchers
                # see to it (kill_under_launcher).
                wait_until(lambda: _have_met(run, started[0]), *started)  # noqa: B023
            _wait_for_a_moment(chance, run, *started)
            if any(each.code is not None for each in started):
                break  # it came to its end first
            victims = started if size == 1 else chance.choice([started[:1], started[1:], started])
            for victim in victims:
                victim.kill()
            for each in sorted(started, key=lambda each: each not in victims):
                _check_end(each, each in victims, run)
            hit[_hit(run)] += 1
            check_nothing_lost(run, saved)
        scene.finish(run, *settings, ranks=size)
    return hit


def kill_while_preparing(scene: Scene, chance: random.Random, kills: int) -> Counter[str]:
    """Kill runs that have yet to make their token dataset, at random moments of the first second.

    The dataset must be that of the uninterrupted run, or the weights would not be.
    """
    hit: Counter[str] = Counter()
    while hit.total() < kills:
        run = scene.place("prepared")
        settings = (f"data.path={run}/data",)
        is_made = run / "data/dataset.json"
        while hit.total() < kills and not is_made.exists():
            process = scene.fork(*scene.go(run, *settings))
            wait_until(lambda: (run / "data/.lock").exists(), process)  # noqa: B023
            time.sleep(chance.random() * 0.25)
            process.kill()
            assert process.wait() == -signal.SIGKILL, process.tail
            hit["a step" if is_made.exists() else "the dataset"] += 1
        process = scene.fork(*scene.go(run, *settings))
        assert process.wait() == 0, process.tail
        scene.check_same(run)
    return hit


def kill_between_renames(scene: Scene) -> None:
    """A step is saved again, now evaluated; the kill comes when the first is out of the way.

    It is the only checkpoint of the run, and must not be taken for none.
    """
    run = scene.place("renamed")
    process = scene.fork(*scene.go(run))
    wait_until(lambda: steps_saved(run), process)
    process.kill()
    process.wait()
    for path in (run / "checkpoints").glob(".*"):
        shutil.rmtree(path)
    only, *later = sorted((run / "checkpoints").glob("step-*"))
    for path in later:
        shutil.rmtree(path)
    only.rename(only.with_name(f".replaced-{only.name}"))
    shutil.copytree(
        only.with_name(f".replaced-{only.name}"), only.with_name(f".writing-{only.name}")
    )
    process = scene.fork(*scene.go(run))
    assert process.wait() == 0, process.tail
    assert f"resuming {run} from step {int(only.name[5:])} of {STEPS}" in process.said, process.tail
    scene.check_same(run)


def _check_end(process: Process, was_killed: bool, run: Path) -> None:
    code = process.wait()
    if was_killed:
        # It may have ended just before, or have noticed that another victim is gone.
        assert code in (-signal.SIGKILL, 0, 1), process.said
    elif code == 0:
        assert steps_saved(run)[-1:] == [STEPS] or "finished" in (run / "status.json").read_text()
    else:
        assert code not in (75, 130), process.tail
        assert "Traceback" not in process.said
        assert process.said.splitlines()[-1].startswith("minigpt: "), process.tail


def _have_met(run: Path, first: Process) -> bool:
    """Whether rank 0 has got so far as to write status.json, for which all ranks must be there."""
    try:
        return bool(json.loads((run / "status.json").read_text())["pid"] == first.pid)
    except (FileNotFoundError, ValueError):
        return False


def _wait_for_a_moment(chance: random.Random, run: Path, *processes: Process) -> None:
    folder = run / "checkpoints"
    last = max(steps_saved(run), default=0)
    kind = chance.choices(("save", "deletion", "step", "any"), (50, 10, 25, 15))[0]
    if kind == "save":
        step = min(last + chance.randint(1, 4), STEPS)  # or the next one that is saved
        wait_until(
            lambda: any(int(path.name[-8:]) >= step for path in folder.glob(".writing-*")),
            *processes,
        )
        time.sleep(chance.random() * 0.03)
    elif kind == "deletion":
        wait_until(lambda: list(folder.glob(".deleting-*")), *processes)
    elif kind == "step":
        before = steps_logged(run)
        after = chance.randint(1, 4)
        wait_until(lambda: steps_logged(run) >= before + after, *processes)
        time.sleep(chance.random() * 0.03)
    else:
        time.sleep(chance.random())


def _hit(run: Path) -> str:
    """What the kill cut short."""
    left = {path.name.partition("-")[0] for path in (run / "checkpoints").glob(".*")}
    for begun, what in (
        (".replaced", "a save"),
        (".deleting", "a deletion"),
        (".writing", "a save"),
    ):
        if begun in left:
            return what
    return "a step" if steps_logged(run) else "the start"


def kill_under_launcher(scene: Scene, chance: random.Random, victims: list[str]) -> Counter[str]:
    """Kill a run of ``--nproc 2`` once for each of ``victims``: launcher, a rank, or everybody.

    The others must end by themselves, saying why, and nobody be left; the same command goes on, and
    in the end, with ranks that srun starts, the run is where the uninterrupted one is.
    """
    hit: Counter[str] = Counter()
    run = scene.place("launched")
    for victim in victims:
        saved = steps_saved(run)
        launcher = scene.fork(*scene.go(run, *TWO_RANKS), "--nproc", 2)
        before = steps_logged(run)
        wait_until(lambda: steps_logged(run) > before + 1, launcher)  # noqa: B023
        if chance.random() < 0.5:
            wait_until(lambda: list((run / "checkpoints").glob(".writing-*")), launcher)
        time.sleep(chance.random() * 0.03)
        assert launcher.code is None, launcher.tail
        if victim == "launcher":
            launcher.kill()
        elif victim == "everybody":
            launcher.kill_all()
        else:
            os.kill(ranks(launcher)[int(victim.removeprefix("rank "))], signal.SIGKILL)
        code = launcher.wait()
        if victim.startswith("rank"):
            assert code == 1, launcher.tail
            way_out = "go on from" if steps_saved(run) else "run the same command again"
            killed = f"minigpt: {victim} was killed by SIGKILL, probably out of memory; {way_out}"
            assert killed in launcher.said, launcher.tail
            assert "Traceback" not in launcher.said
        else:
            assert code == -signal.SIGKILL
        hit[_hit(run)] += 1
        check_nothing_lost(run, saved)
    scene.finish(run, *TWO_RANKS, ranks=2)
    return hit
