"""Which faults are tried, how often: the short list for pytest, the long one for a table."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from signal import SIGINT, SIGTERM, SIGUSR1

from tests.faults import damage, deceit, disks, kills, neighbours, planted, signals, sockets
from tests.faults.scene import Scene, chance_of, newest

Done = int | Counter[str] | None
"""How many faults a trial was, or what they hit; None: one."""


@dataclass(frozen=True)
class Trial:
    kind: str
    name: str
    do: Callable[[Scene], Done]


VARIANTS: tuple[tuple[str, ...], ...] = (
    (),
    ("checkpoint.asynchronous=false",),
    ("precision.dtype=bf16", "optimizer.name=muon"),
    ("checkpoint.every_steps=3", "checkpoint.keep_last=1"),
    ("precision.dtype=fp16", "model.family=gpt2", "model.num_key_value_heads=4"),
)
PHASES = (signals.STARTING, signals.IMPORTING, *signals.PHASES)
RANK_PHASES = (signals.STARTING, signals.WORKERS_IMPORTING, *signals.PHASES)
SIGNALS = (SIGTERM, SIGINT, SIGUSR1)
TWICE = ((SIGTERM, SIGTERM), (SIGTERM, SIGINT), (SIGINT, SIGINT), (SIGUSR1, SIGTERM))


def short(seed: int) -> Iterator[Trial]:
    """About half a minute's worth."""
    yield _kill(seed, 6, VARIANTS[0])
    yield _kill_preparing(seed, 3)
    yield _kill_launched(seed, "rank 1")
    yield from _once()
    yield from _damage(seed, 1, resume=range(0, 100, 20))
    yield from _deceit(resume=range(0, 200, 50))
    yield Trial("planted links", "to directories", planted.links_to_directories)
    yield from _disks((700_000,))
    for phase, (number, signum) in zip(signals.PHASES, enumerate(itertools.cycle(SIGNALS))):  # noqa: B905
        if number % 3 == 0:
            yield _signal(seed, phase, signum, hail=number % 2 == 0)
    yield _signal(seed, signals.STARTING, SIGTERM, SIGINT, how="fresh")
    yield from _neighbours(seed, 4)


def long(seed: int, kill_count: int) -> Iterator[Trial]:
    """The faults of ``kill_count`` kills of single processes and as many of the others as fit."""
    for number, variant in zip(range(0, kill_count, 25), itertools.cycle(VARIANTS)):
        yield _kill(seed + number, min(25, kill_count - number), variant)
    for number in range(4):
        yield _kill_preparing(seed + number, 10)
    for number, strategy in enumerate(("fsdp", "ddp")):
        yield _kill_ranks(seed + number, 20, f"distributed.strategy={strategy}")
    for number in range(3):
        yield _kill_launched(seed + number, "rank 0", "rank 1", "launcher", "everybody")
    yield from _once()
    yield from _damage(seed, 6, resume=range(200))
    yield from _deceit(resume=range(200))
    yield from _planted()
    yield from _sockets(seed)
    yield from _disks()
    for phase, signum in itertools.product(signals.PHASES, SIGNALS):
        yield _signal(seed, phase, signum)
    for phase, twice in itertools.product(signals.PHASES, TWICE):
        yield _signal(seed, phase, *twice)
    for phase in PHASES:
        yield _signal(seed, phase, SIGTERM, SIGINT, how="fresh", hail=True)
    for phase, signum in itertools.product(PHASES[:2], SIGNALS):
        yield _signal(seed, phase, signum, how="fresh")
    yield _random_signals(seed, 60, 1.5)
    yield _random_signals(seed, 40, 3.0, how="fresh")
    for phase, signum in itertools.product(RANK_PHASES, SIGNALS):
        yield _signal(seed, phase, signum, how="launcher")
    for phase in RANK_PHASES[2:6]:
        yield _signal(seed, phase, SIGTERM, SIGINT, how="launcher", hail=True)
        yield _signal(seed, phase, SIGINT, how="everybody")
    for phase in RANK_PHASES[4:6]:
        yield _signal(seed, phase, SIGTERM, how="rank 1")
    for number in range(3):
        yield from _neighbours(seed + number, 12)


def _kill(seed: int, count: int, settings: tuple[str, ...]) -> Trial:
    def do(scene: Scene) -> Done:
        chance = chance_of(seed, "kill", *settings)
        hit = kills.kill_processes(scene, chance, count, *settings)
        while not hit["a save"] and hit.total() < 10 * count:
            hit += kills.kill_processes(scene, chance, count, *settings)
        assert hit["a save"], f"no kill came in a save: {hit}"
        return hit

    return Trial("SIGKILL, one process", " ".join(settings) or "plain", do)


def _kill_preparing(seed: int, count: int) -> Trial:
    return Trial(
        "SIGKILL, making the dataset",
        f"seed {seed}",
        lambda scene: kills.kill_while_preparing(scene, chance_of(seed, "prepare"), count),
    )


def _kill_ranks(seed: int, count: int, *settings: str) -> Trial:
    return Trial(
        "SIGKILL, one or both of 2 ranks",
        " ".join(settings),
        lambda scene: kills.kill_processes(
            scene, chance_of(seed, "ranks", *settings), count, *settings, size=2
        ),
    )


def _kill_launched(seed: int, *victims: str) -> Trial:
    return Trial(
        "SIGKILL under --nproc 2",
        ", ".join(victims),
        lambda scene: kills.kill_under_launcher(
            scene, chance_of(seed, "launched", *victims), list(victims)
        ),
    )


def _once() -> Iterator[Trial]:
    yield Trial("SIGKILL, one process", "between two renames", kills.kill_between_renames)
    yield Trial("damage", "all checkpoints", damage.damage_everything)
    yield Trial("damage", "one shard of two ranks' each", damage.damage_before_two_ranks)


def _damage(seed: int, times: int, resume: range) -> Iterator[Trial]:
    """All accidents in one trial, since they are known once there is a checkpoint to damage."""

    def do(scene: Scene) -> int:
        chance = chance_of(seed, "damage")
        done = -1
        for done, each in enumerate(damage.accidents(chance, newest(scene.straight()), times)):
            damage.try_damage(scene, each, resume=done in resume)
        return done + 1

    yield Trial("damage", "bits flipped, ends cut off, files lost", do)


def _deceit(resume: range) -> Iterator[Trial]:
    def all_of(make: Callable[[Scene], Iterator[damage.Damage]]) -> Callable[[Scene], int]:
        def do(scene: Scene) -> int:
            done = -1
            for done, each in enumerate(make(scene)):
                damage.try_damage(scene, each, resume=done in resume)
            return done + 1

        return do

    yield Trial("pickles", "all", all_of(lambda scene: deceit.pickles(scene.canary)))
    yield Trial("ways out of a checkpoint", "all", all_of(lambda s: deceit.ways_out(s.outside)))
    yield Trial("lies", "all", all_of(lambda _: deceit.lies()))


def _planted() -> Iterator[Trial]:
    yield Trial("planted links", "to files", planted.links_to_files)
    yield Trial("planted links", "to directories", planted.links_to_directories)
    yield Trial("--out over other files", "all names", planted.out_over_files)


def _sockets(seed: int) -> Iterator[Trial]:
    yield Trial("sockets", "all listen on loopback", sockets.all_on_loopback)
    yield Trial("sockets", "noise", lambda s: sockets.noise(s, chance_of(seed, "noise")))
    yield Trial("sockets", "forged failures", sockets.forged_failures)


def _disks(leave_free: tuple[int, ...] = (0, 300_000, 700_000)) -> Iterator[Trial]:
    full = "full disk"
    yield Trial(full, "before the run", disks.full_before_the_run)
    for leave in leave_free:
        yield Trial(
            full,
            f"in the run, {leave:,} bytes are left",
            lambda scene, leave=leave: disks.full_in_the_run(scene, leave),
        )
    yield Trial(full, "no inodes", disks.no_inodes_in_the_run)
    for how, settings in (("", ()), (", saves that are waited for", VARIANTS[1])):
        yield Trial(
            full,
            f"at the last save{how}",
            lambda scene, settings=settings: disks.full_at_the_end(scene, *settings),
        )
        yield Trial(
            full,
            f"and SIGTERM{how}",
            lambda scene, settings=settings: disks.stopped_on_a_full_disk(scene, *settings),
        )
    yield Trial(full, "for metrics.jsonl", disks.metrics_on_a_full_disk)
    no = "no right to write"
    yield Trial(no, "before the run", disks.forbidden_before_the_run)
    yield Trial(no, "in the run", disks.forbidden_in_the_run)
    yield Trial(no, "remounted read-only in the run", disks.read_only_in_the_run)
    for what in (".", "checkpoints"):
        yield Trial(
            no,
            f"to {what}, between runs",
            lambda scene, what=what: disks.forbidden_between_runs(scene, what),
        )


def _signal(
    seed: int, phase: signals.Phase, *sent: signals.Signal, how: str = "fork", hail: bool = False
) -> Trial:
    many = "a hail of signals" if hail else "two signals" if len(sent) > 1 else "a signal"
    where = {"fork": "", "fresh": ""}.get(how, f", --nproc 2: {how}")
    names = ", ".join(signum.name for signum in sent)
    return Trial(
        f"{many}{where}",
        f"{phase.name}, {names}, {how}",
        lambda scene: signals.signal_until_hit(
            scene, chance_of(seed, phase.name, names, how), phase, *sent, how=how, hail=hail
        ),
    )


def _random_signals(seed: int, count: int, seconds: float, how: str = "fork") -> Trial:
    def do(scene: Scene) -> int:
        for number in range(count):
            signals.signal_at_random(scene, chance_of(seed, "signal", number), seconds, how)
        return count

    return Trial("signals at any moment", how, do)


def _neighbours(seed: int, times: int) -> Iterator[Trial]:
    kind = "a second process"
    chance = chance_of(seed, kind)

    def refuse(scene: Scene) -> int:
        in_saves = neighbours.refuse_others(scene, chance, times, nproc=True)
        assert in_saves, "none came in a save"
        return times + 1

    yield Trial(kind, "in training and in saves", refuse)
    yield Trial(kind, "at once", lambda scene: neighbours.start_at_once(scene, chance))
    yield Trial(kind, "while data is prepared", neighbours.refuse_others_in_preparation)
    if times > 4:
        yield Trial(kind, "while --nproc 2 trains", neighbours.refuse_while_ranks_train)
