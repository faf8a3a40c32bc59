"""Try thousands of mutated files, environments and command lines: ``python -m tests.fuzz``.

Ends with 1 if one wasn't handled. The same seed gives the same cases; ``--only KIND --case K``
tries one again and shows what it prints.
"""

import argparse
import functools
import gc
import importlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.fuzz.cases import KINDS, Case, make_case
from tests.fuzz.run import OUTCOMES, Ended, outcome, run_command
from tests.fuzz.scene import make_scene

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than a case may
    "PATH": os.environ["PATH"],
    "HOME": "home",
    "COLUMNS": "200",
    "LANG": "C.UTF-8",
}
CANARY = "nobody may change this\n"


@dataclass(frozen=True)
class Tried:
    kind: str
    number: int
    outcome: str
    detail: str
    seconds: float
    said: str = ""  # where asked for, or where it wasn't handled


def import_all() -> None:
    """Import what commands import, but for transformers: without it an export isn't checked."""
    os.environ |= ENVIRONMENT
    for name in ("transformers", "peft", "wandb", "tensorboard"):
        sys.modules[name] = None  # type: ignore[assignment]
    from typer import main

    from minigpt_cli.cli import app

    command = main.get_command(app)  # takes a sixth of a short command's time
    main.get_command = lambda _: command


def build_scene(top: Path) -> None:
    """Make the scene in ``top``; import here what its commands imported."""
    (top / "scene").mkdir()
    os.chdir(top / "scene")
    modules = top / "modules"

    def minigpt(arguments: list[str], **variables: str) -> int:
        asked = {"FUZZ_MODULES": str(modules), "XDG_CACHE_HOME": str(top / "cache")}
        ended = run_command(arguments, ENVIRONMENT | asked | variables, top)
        if ended.code > 0:
            print(ended, file=sys.stderr)
        for name in modules.read_text().split():
            if name not in sys.modules:
                try:
                    importlib.import_module(name)
                except Exception:
                    sys.modules.pop(name, None)
        return ended.code

    make_scene(minigpt)


Job = tuple[Path, int, str, int, bool]  # scene, seed, kind, number of the case, whether to show it


def try_case(job: Job) -> Tried:
    """Try a case; once more with --debug where that tells more."""
    tried = _attempt(job, debug=False)
    if tried.outcome == "traceback" or job[-1]:
        again = _attempt(job, debug=True)
        detail = again.detail if tried.outcome == "traceback" else tried.detail
        return replace(tried, detail=detail, said=again.said)
    return tried


def _attempt(job: Job, debug: bool) -> Tried:
    """Make a case in a directory of this process's own, run it, and see what came of it."""
    top, seed, name, number, show = job
    kind = KINDS[name]
    own = top / f"worker-{os.getpid()}"
    place, log = own / "case", own / "log"
    _clear(own)
    log.mkdir(parents=True)
    (place / "here").mkdir(parents=True)
    for canary in (own / "canary", place / "canary"):
        canary.write_text(CANARY)
    for part in dict.fromkeys(kind.needs.split()):
        source = top / "scene" / part
        if source.is_dir():
            shutil.copytree(source, place / "here" / part)
        else:
            shutil.copy2(source, place / "here" / part)
    os.chdir(place / "here")
    try:
        case = make_case(kind, random.Random(f"{seed} {name} {number}"))
    except Exception as error:
        raise RuntimeError(f"{name} {number} can't be made") from error
    ended = run_command(
        case.arguments + ["--debug"] * debug,
        ENVIRONMENT | {"TMPDIR": str(log), "XDG_CACHE_HOME": str(log / "cache")} | case.environment,
        log,
    )
    result, detail = outcome(ended)
    watched = {own: {"canary", "case", "log"}}
    if not kind.is_users:
        watched[place] = {"canary", "here"}
    for folder, names in watched.items():
        if set(os.listdir(folder)) != names or (folder / "canary").read_text() != CANARY:
            result, detail = "outside", str(set(os.listdir(folder)) ^ names)
    if result == "handled" and ended.code == 0 and case.must_be_refused:
        result, detail = "deceived", " ".join(case.arguments)
    said = _transcript(case, ended) if show or result != "handled" else ""
    os.chdir(top)
    _clear(own)
    return Tried(name, number, result, detail, ended.seconds, said)


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _transcript(case: Case, ended: Ended) -> str:
    variables = [f"{name}={value[:60]!r}" for name, value in case.environment.items()]
    words = [word if len(word) < 100 else f"{word[:100]}..." for word in case.arguments]
    lines = [*case.done, " ".join([*variables, "minigpt", *map(repr, words)])]
    output = ended.output if len(ended.output) < 2000 else ended.output[-2000:]
    return "\n".join(
        [*lines, output, ended.errors[-6000:], f"exit code {ended.code}, {ended.seconds:.1f} s"]
    )


def jobs(top: Path, seed: int, count: int, only: str) -> Iterator[Job]:
    """Yield the cases of all kinds in turn, each kind as often as its share."""
    kinds = [name for name in KINDS if only in ("", name)]
    cycle = [name for name in kinds for _ in range(KINDS[name].share)]
    random.Random(0).shuffle(cycle)
    numbers: Counter[str] = Counter()
    for index in range(count):
        name = cycle[index % len(cycle)]
        yield top, seed, name, numbers[name], False
        numbers[name] += 1


def _silence() -> None:
    """Print nothing: Rust does where a mutation makes it panic."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def try_all(jobs: Iterable[Job], workers: int, minutes: float) -> list[Tried]:
    """Try cases until they or the time are used up."""
    in_time = functools.partial(_try_before, time.monotonic() + 60 * minutes)
    with multiprocessing.get_context("fork").Pool(workers, _silence) as pool:
        tried = [each for each in pool.imap_unordered(in_time, jobs) if each is not None]
    return sorted(tried, key=lambda each: (each.kind, each.number))


def _try_before(deadline: float, job: Job) -> Tried | None:
    return try_case(job) if time.monotonic() < deadline else None


def report(console: Console, tried: list[Tried], seed: int) -> None:
    """Print a table, and what wasn't handled, the most frequent first."""
    table = Table(title="Fuzzing")
    for heading in ("kind", "cases", *OUTCOMES, "seconds"):
        table.add_column(heading, justify="left" if heading == "kind" else "right")
    for name in [*KINDS, "all"]:
        if not (rows := [each for each in tried if name in (each.kind, "all")]):
            continue
        counts = Counter(each.outcome for each in rows)
        seconds = sum(each.seconds for each in rows)
        table.add_row(
            name, str(len(rows)), *(str(counts[result]) for result in OUTCOMES), f"{seconds:.0f}"
        )
    groups: dict[tuple[str, str], list[Tried]] = defaultdict(list)
    for each in tried:
        if each.outcome != "handled":
            groups[each.outcome, each.detail].append(each)
    for (result, detail), found in sorted(groups.items(), key=lambda group: -len(group[1])):
        first = found[0]
        console.print(f"\n{result}, {len(found)} times: {detail}", style="red", markup=False)
        console.print(
            f"python -m tests.fuzz --only {first.kind} --case {first.number} --seed {seed}",
            markup=False,
        )
        lines = [line[:300] for line in first.said.splitlines() if line.strip()]
        console.print("\n".join(f"    {line}" for line in lines[:4] + lines[4:][-8:]), markup=False)
    console.print(table)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10, help="stop after so long")
    parser.add_argument("--workers", type=int, default=1 + (os.cpu_count() or 1))  # some wait
    parser.add_argument("--only", default="", choices=["", *KINDS], metavar="KIND")
    parser.add_argument("--case", type=int, help="of --only KIND: try this one and show it")
    given = parser.parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True, width=160)
    before = Path.cwd()
    memory = Path("/dev/shm")
    top = Path(tempfile.mkdtemp(prefix="minigpt-fuzz-", dir=memory if memory.is_dir() else None))
    try:
        import_all()
        build_scene(top)
        gc.collect()
        gc.freeze()  # children share it, as long as nobody counts references anew
        if given.case is not None:
            tried = [try_case((top, given.seed, given.only, given.case, True))]
            print(tried[0].said)
        else:
            tried = try_all(
                jobs(top, given.seed, given.cases, given.only), given.workers, given.minutes
            )
    finally:
        os.chdir(before)
        shutil.rmtree(top, ignore_errors=True)
    report(console, tried, given.seed)
    if given.case is None and len(tried) < given.cases:
        console.print(
            f"stopped after {given.minutes} minutes: {len(tried):,} of {given.cases:,} cases"
        )
    return int(any(each.outcome != "handled" for each in tried))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
