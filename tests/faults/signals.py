"""SIGTERM, SIGINT and SIGUSR1 at every phase of a run, once and twice, to one process and to two.

Each time it ends within 30 s with 75 (130 after SIGINT), or with 0 where it had finished; and the
same command, given again, ends with the weights of the uninterrupted run.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.scene import STEPS, TWO_RANKS, Scene, check_nothing_lost
from tests.helpers.processes import Process, family, handles, has_mapped, ranks
from tests.helpers.runs import steps_logged, steps_saved
from tests.helpers.waiting import wait_until

SLOW_EVALUATION = ("eval.windows=200",)
IN_TIME = 30.0
Signal = signal.Signals


@dataclass(frozen=True)
class Phase:
    """A part of a process's life, told from outside."""

    name: str
    is_now: Callable[[Process, Path], bool]
    settings: tuple[str, ...] = ()


def _saving(step: int | None = None) -> Callable[[Process, Path], bool]:
    name = "*" if step is None else f"{step:08d}"
    return lambda _, run: any((run / "checkpoints").glob(f".writing-step-{name}"))


def _evaluating(_: Process, run: Path) -> bool:
    try:
        text = (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return False
    last = text.rstrip("\n").rpartition("\n")[2]
    return "grad_norm" in last and int(last.split()[1].rstrip(",")) % 6 == 0


def _finished(_: Process, run: Path) -> bool:
    status = run / "status.json"
    return status.exists() and '"finished"' in status.read_text()


STARTING = Phase("handlers set", lambda process, _: handles(process.pid, signal.SIGTERM))
IMPORTING = Phase(
    "importing",
    lambda process, run: has_mapped(process.pid, "libtorch_cpu") and not run.exists(),
)
WORKERS_IMPORTING = Phase(
    "importing",
    lambda process, run: (
        any(has_mapped(pid, "libtorch_cpu") for pid in ranks(process).values()) and not run.exists()
    ),
)
TOKENIZING = Phase(
    "tokenizing",
    lambda _, run: (run / "data/.lock").exists() and not (run / "data/dataset.json").exists(),
    ("data.path={run}/data",),
)
PHASES = (
    TOKENIZING,
    Phase(
        "building",
        lambda _, run: (run / ".lock").exists() and not (run / "metrics.jsonl").exists(),
    ),
    Phase("training", lambda _, run: 3 < steps_logged(run) < STEPS - 3),
    Phase("evaluating", _evaluating, SLOW_EVALUATION),
    Phase("saving", _saving()),
    Phase("last save", _saving(STEPS)),
    Phase("finished", _finished),
)


def signal_in(
    scene: Scene,
    chance: random.Random,
    phase: Phase,
    *signals: signal.Signals,
    how: str = "fork",
    hail: bool = False,
) -> bool:
    """Send signals to a run in a phase, the second a moment after the first, and go on with it.

    Args:
        how: ``fork``; ``fresh``, a process that has yet to import torch; or with ``--nproc 2`` to
            the ``launcher``, to ``everybody`` as a terminal does, or to ``rank 1`` alone.
        hail: go on sending these signals, every millisecond, until it ends.

    Returns:
        Whether the phase was still on when the first signal had been sent.
    """
    run = scene.place("stopped")
    size = 1 if how in ("fork", "fresh") else 2
    ranks_settings = TWO_RANKS if size == 2 else ()
    settings = tuple(each.format(run=run) for each in phase.settings) + ranks_settings
    same_as = tuple(each for each in settings if not each.startswith("data.path"))
    arguments = [*scene.go(run, *settings), *(["--nproc", 2] if size == 2 else [])]
    process = scene.fresh(*arguments) if how == "fresh" else scene.fork(*arguments)
    is_hit = False
    if wait_until(lambda: phase.is_now(process, run), process):
        time.sleep(chance.random() * 0.01)
        for number, signum in enumerate(signals):
            if number:
                time.sleep(chance.choice([0, 0.001, 0.01, 0.1]))
            for pid in _receivers(process, how):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signum)
            is_hit |= not number and process.code is None and phase.is_now(process, run)
        while hail and process.code is None:
            process.send(chance.choice(signals))
            time.sleep(0.001)
    check_stopped(process, run, *signals)
    if (run / "checkpoints").exists():
        check_nothing_lost(run, [])
    again = scene.fork(*arguments)
    assert again.wait() == 0, again.tail
    scene.check_same(run, *same_as, ranks=size)
    return is_hit


def signal_until_hit(
    scene: Scene,
    chance: random.Random,
    phase: Phase,
    *signals: signal.Signals,
    how: str = "fork",
    hail: bool = False,
) -> int:
    """``signal_in`` until a signal came in the phase; how often it took.

    Raises:
        AssertionError: also where it never did, since nothing was tried then.
    """
    for attempt in range(1, 21):
        if signal_in(scene, chance, phase, *signals, how=how, hail=hail):
            return attempt
    raise AssertionError(f"no signal came in the phase {phase.name}")


def _receivers(process: Process, how: str) -> list[int]:
    if how == "everybody":
        return family(process)
    if how.startswith("rank"):
        return [pid for rank, pid in ranks(process).items() if f"rank {rank}" == how]
    return [process.pid] if process.code is None else []


def check_stopped(process: Process, run: Path, *signals: signal.Signals) -> None:
    """It ended in time as it should after these signals."""
    code = process.wait(IN_TIME)
    status = run / "status.json"
    if code == 0:
        assert "finished at step" in process.said, process.tail
        assert _finished(process, run)
        return
    # Of two signals that come at once the first to be seen isn't always the first to be sent.
    expected = {130 if signum == signal.SIGINT else 75 for signum in signals}
    assert code in expected, f"exit code {code} after {signals}: {process.said}"
    assert "Traceback" not in process.said, process.tail
    told = [line for line in process.said.splitlines() if line.startswith("minigpt: ")]
    assert len(set(told)) == 1, process.said  # two ranks that haven't met yet say the same
    assert told[0].startswith("minigpt: stopped by "), process.tail
    if "everything is saved" in told[0]:
        assert f"minigpt resume {run}" in told[0]
        assert f"at step {steps_saved(run)[-1]} of" in told[0]
        assert f'"exit_code": {code}' in status.read_text()


def signal_at_random(
    scene: Scene, chance: random.Random, seconds: float, how: str = "fork"
) -> None:
    """A signal, or two, at a moment within so many seconds after its handlers are set."""
    kinds = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    signals = chance.choices(kinds, k=chance.randint(1, 2))
    phase = Phase("random", _later(chance.random() * seconds))
    signal_in(scene, chance, phase, *signals, how=how)


def _later(seconds: float) -> Callable[[Process, Path], bool]:
    since: list[float] = []

    def is_now(process: Process, _: Path) -> bool:
        if not since and handles(process.pid, signal.SIGTERM):
            since.append(time.monotonic())
        return bool(since) and time.monotonic() > since[0] + seconds

    return is_now
