"""Disks that are full, run out of inodes, or can't be written to: before a run, and in it."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.scene import (
    STEPS,
    Scene,
    check_nothing_lost,
    disk,
    give_to_nobody,
    is_whole,
    lines,
    newest,
    steps_saved,
)  # fmt: skip
from tests.helpers.processes import NOBODY
from tests.helpers.waiting import wait_until

NOT_WRITTEN = "the checkpoint could not be written: "
GOES_ON = "; training goes on and saves again at the next interval"


def full_before_the_run(scene: Scene) -> None:
    """It is refused before the first step, and runs once there is room."""
    with disk(scene.place("disk"), "size=300k") as place:
        code, said = scene.do(*scene.go(place / "run"))
        assert code == 2, said
        told = said.splitlines()[-1]
        assert told.startswith(f"minigpt: {place}/run: a checkpoint takes 0.67 MB, and 0."), said
        assert told.endswith(" MB are free: make room, or choose another --out"), said
        assert "step 1/" not in said
        subprocess.run(["mount", "-o", "remount,size=50m", place], check=True)
        scene.finish(place / "run")


def full_in_the_run(scene: Scene, leave: int) -> None:
    """Saves fail while there is no room; the run and the older checkpoints live on.

    Args:
        leave: bytes of the disk that are left free, more or less.
    """

    def fill(place: Path) -> None:
        _fill_up(place / "filler")
        os.truncate(place / "filler", max(0, (place / "filler").stat().st_size - leave))

    with disk(scene.place("disk"), "size=8m") as place:
        _trouble(scene, place / "run", lambda: fill(place), lambda: (place / "filler").unlink())


def no_inodes_in_the_run(scene: Scene) -> None:
    """The disk has room for bytes but not for files."""

    def fill(place: Path) -> None:
        (place / "filler").mkdir()
        try:
            for number in range(1000):
                (place / f"filler/{number}").touch()
        except OSError:
            pass

    def empty(place: Path) -> None:
        for file in (place / "filler").iterdir():
            file.unlink()

    with disk(scene.place("disk"), "size=50m,nr_inodes=100") as place:
        _trouble(scene, place / "run", lambda: fill(place), lambda: empty(place))


def forbidden_in_the_run(scene: Scene) -> None:
    """Somebody takes the right to write away from the user who trains, and gives it back."""
    run = scene.place("forbidden")
    run.mkdir()
    give_to_nobody(run)
    folder = run / "checkpoints"
    _trouble(scene, run, lambda: folder.chmod(0o555), lambda: folder.chmod(0o755), user=NOBODY)


def read_only_in_the_run(scene: Scene) -> None:
    """The disk is remounted read-only, as the kernel does after an error, and again writable."""
    with disk(scene.place("disk"), "size=50m") as place:
        run = place / "run"
        with contextmanager(_mounted)(run) as mounted:
            _trouble(scene, run, lambda: mounted("ro"), lambda: mounted("rw"))


def _mounted(folder: Path) -> Iterator[Callable[[str], None]]:
    """Lay a mount of its own over a run's checkpoints, since one with open files can't change."""
    target = folder / "checkpoints"

    def remount(how: str) -> None:
        if how == "ro":
            subprocess.run(["mount", "--bind", target, target], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", target], check=True)
        else:
            subprocess.run(["umount", target], check=True)

    yield remount


def _trouble(
    scene: Scene,
    run: Path,
    begin: Callable[[], object],
    end: Callable[[], object],
    user: int | None = None,
) -> None:
    """Begin trouble with a run's disk when it has saved once, and end it when saves have failed.

    The run keeps more checkpoints than it can have saved by then: those that it deletes would make
    room.
    """
    settings = ("train.steps=60", "checkpoint.keep_last=6")
    scene.straight(*settings)  # makes the data, which another user may not
    process = scene.fork(*scene.go(run, *settings), user=user)
    wait_until(lambda: len(steps_saved(run)) > 1, process)
    with process.stopped():
        begin()
        saved = steps_saved(run)
    wait_until(lambda: process.said.count(GOES_ON) > 1, process)
    with process.stopped():
        assert process.code is None, process.tail
        check_nothing_lost(run, saved)
        failed = [line for line in process.said.splitlines() if NOT_WRITTEN in line]
        assert all(line.startswith("warning: ") and line.endswith(GOES_ON) for line in failed)
        end()
        before = steps_saved(run)
    wait_until(lambda: steps_saved(run)[-1] > before[-1], process)
    assert process.code is None, f"it ended before it could save again: {process.said}"
    assert process.wait() == 0, process.tail
    assert "Traceback" not in process.said
    metrics = "metrics.jsonl could not be written" not in process.said
    scene.check_same(run, *settings, metrics=metrics)
    lines(run)


def full_at_the_end(scene: Scene, *settings: str) -> None:
    """The last save must be there: otherwise exit code 2, and the same command with room saves."""
    with disk(scene.place("disk"), "size=900k") as place:
        run = place / "run"
        process = scene.fork(*scene.go(run, *settings))
        assert process.wait() == 2, process.tail
        told = process.said.splitlines()[-1]
        assert f"step-{STEPS:08d}: {NOT_WRITTEN}it takes 0.67 MB, and 0." in told
        assert "older checkpoints are untouched: free some space or repair the path, then" in told
        assert process.said.count(GOES_ON) > 3
        assert "Traceback" not in process.said
        assert is_whole(newest(run))
        assert scene.do("verify", run)[0] == 0
        subprocess.run(["mount", "-o", "remount,size=50m", place], check=True)
        scene.finish(run, *settings)


def stopped_on_a_full_disk(scene: Scene, *settings: str) -> None:
    """SIGTERM where nothing can be saved: not 75, for that promises that everything is."""
    with disk(scene.place("disk"), "size=8m") as place:
        run = place / "run"
        process = scene.fork(*scene.go(run, *settings))
        wait_until(lambda: len(steps_saved(run)) > 1, process)
        with process.stopped():
            _fill_up(place / "filler")
            saved = steps_saved(run)
        wait_until(lambda: GOES_ON in process.said, process)
        process.send(signal.SIGTERM)
        assert process.wait(30) == 2, process.tail
        assert NOT_WRITTEN in process.said.splitlines()[-1], process.tail
        assert "older checkpoints are untouched" in process.said.splitlines()[-1]
        check_nothing_lost(run, saved)
        _fill_up(place / "more")  # with what a save left that it began before the disk was full
        code, said = scene.do(*scene.go(run, *settings))
        assert code == 2, said
        assert "a checkpoint takes 0.67 MB, and 0.00 MB are free: make room" in said, said
        assert "Traceback" not in said
        check_nothing_lost(run, saved)
        (place / "filler").unlink()
        (place / "more").unlink()
        process = scene.fork(*scene.go(run, *settings))
        assert process.wait() == 0, process.tail
        scene.check_same(run, *settings, metrics=False)


def metrics_on_a_full_disk(scene: Scene) -> None:
    """metrics.jsonl can't be written: it is said, the run goes on, and no line is torn."""
    settings = ("train.steps=60", "checkpoint.every_steps=50")
    with disk(scene.place("disk"), "size=3m") as place:
        run = place / "run"
        process = scene.fork(*scene.go(run, *settings))
        wait_until(lambda: lines(run), process)
        with process.stopped():
            _fill_up(place / "filler")
        warning = "warning: metrics.jsonl could not be written: No space left on device"
        wait_until(lambda: warning in process.said, process)
        assert process.code is None, process.tail
        (place / "filler").unlink()
        assert process.wait() == 0, process.tail
        assert "Traceback" not in process.said
        lines(run)
        scene.check_same(run, *settings, metrics=False)


def _fill_up(file: Path) -> None:
    with file.open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass


def forbidden_before_the_run(scene: Scene) -> None:
    """Where nothing can be written it says so, with exit code 2, and touches nothing."""
    run = scene.place("forbidden")
    run.mkdir(mode=0o555)
    code, said = scene.do(*scene.go(run), user=NOBODY)
    assert code == 2, said
    assert said.splitlines()[-1] == f"minigpt: {run}: can't be written to: Permission denied"
    assert os.listdir(run) == []


def forbidden_between_runs(scene: Scene, what: str) -> None:
    """A run whose directory, or checkpoints, can be read but not written any more.

    It can be verified; going on is refused and harms nothing, until the right is back.
    """
    run = scene.place("forbidden")
    run.mkdir()
    give_to_nobody(run)
    scene.straight()  # makes the data, which another user may not
    process = scene.fork(*scene.go(run), user=NOBODY)
    wait_until(lambda: len(steps_saved(run)) > 3, process)
    process.kill()
    process.wait()
    saved = steps_saved(run)
    folder = run / what
    folder.chmod(0o555)
    assert scene.do("verify", run, user=NOBODY)[0] == 0
    code, said = scene.do(*scene.go(run), user=NOBODY)
    assert code == 2, said
    told = said.splitlines()[-1]
    assert told.startswith("minigpt: "), said
    assert "Permission denied" in told, said
    assert str(folder) in told, said
    assert "Traceback" not in said
    check_nothing_lost(run, saved)
    folder.chmod(0o755)
    again = scene.fork(*scene.go(run), user=NOBODY)
    assert again.wait() == 0, again.tail
    scene.check_same(run)
