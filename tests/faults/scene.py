"""Where faults are tried: a folder with a text, a recipe, and the runs that nothing happened to."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.helpers import processes
from tests.helpers.processes import NOBODY, ROOT, Process
from tests.helpers.ranks import free_port
from tests.helpers.recipes import TINY
from tests.helpers.runs import curve, steps_saved

STEPS = 18
BASE = (
    f"train.steps={STEPS}", "model.dropout=0.1", "precision.dtype=fp32", "eval.every_steps=6",
    "checkpoint.every_steps=1", "checkpoint.keep_last=3",
)  # fmt: skip

TWO_RANKS = ("distributed.strategy=fsdp",)


class CannotTry(Exception):
    """A fault needs what isn't here, such as the right to mount a disk."""


@dataclass
class Scene:
    """Names of runs and logs are given out once; one that is not random is the straight run's."""

    folder: Path
    started: list[Process] = field(default_factory=list)
    straight_runs: dict[tuple[int, tuple[str, ...]], Path] = field(default_factory=dict)

    @property
    def recipe(self) -> Path:
        return self.folder / "tiny.toml"

    @property
    def canary(self) -> Path:
        """What a pickle would create, if somebody loaded it."""
        return self.folder / "executed"

    @property
    def outside(self) -> Path:
        """A file that no checkpoint may lead to."""
        return self.folder / "outside"

    def place(self, name: str) -> Path:
        """A path that isn't there yet."""
        number = 1
        while (path := self.folder / f"{name}-{number}").exists():
            number += 1
        return path

    def fork(self, *arguments: object, user: int | None = None, **environment: str) -> Process:
        own = self._own | environment
        return self._kept(processes.fork(self._log(), *arguments, user=user, **own))

    def fresh(self, *arguments: object, **environment: str) -> Process:
        return self._kept(processes.fresh(self._log(), *arguments, **self._own | environment))

    @property
    def _own(self) -> dict[str, str]:
        """Variables that leave the user's cache directory alone."""
        return {"XDG_CACHE_HOME": str(self.folder / "cache")}

    def _log(self) -> Path:
        return self.folder / "logs" / f"{len(self.started)}.txt"

    def _kept(self, started: Process) -> Process:
        self.started.append(started)
        return started

    def do(self, *arguments: object, user: int | None = None) -> tuple[int, str]:
        """Run a command to its end: its exit code, and what it says."""
        done = self.fork(*arguments, user=user)
        return done.wait(), done.said

    def go(self, run: Path, *settings: str) -> list[object]:
        """The one command that starts a run, and goes on with it as often as it is given."""
        arguments: list[object] = ["resume", run, "--or-start", self.recipe]
        for setting in (*BASE, *settings):
            arguments += ["--set", setting]
        return arguments

    def straight(self, *settings: str, ranks: int = 1) -> Path:
        """The run of these settings that nothing happens to."""
        key = (ranks, settings)
        if key not in self.straight_runs:
            run = self.place("straight")
            for each in self.start(ranks, run, *settings):
                assert each.wait() == 0, each.tail
            self.straight_runs[key] = run
        return self.straight_runs[key]

    def start(self, ranks: int, run: Path, *settings: str) -> list[Process]:
        """One process, or several ranks as srun would start them."""
        if ranks == 1:
            return [self.fork(*self.go(run, *settings))]
        port = str(free_port())
        return [
            self.fork(
                *self.go(run, *settings), RANK=str(rank), LOCAL_RANK=str(rank),
                WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            for rank in range(ranks)
        ]  # fmt: skip

    def finish(self, run: Path, *settings: str, ranks: int = 1) -> list[Process]:
        """Go on to the end, and see that it is where the run would have come to by itself."""
        processes = self.start(ranks, run, *settings)
        for each in processes:
            assert each.wait() == 0, each.tail
        self.check_same(run, *settings, ranks=ranks)
        return processes

    def check_same(self, run: Path, *settings: str, ranks: int = 1, metrics: bool = True) -> None:
        """The run ended with the weights, moments, state and curve of the uninterrupted one."""
        straight = self.straight(*settings, ranks=ranks)
        last = newest(straight)
        mine = run / "checkpoints" / last.name
        assert is_whole(mine), os.listdir(run / "checkpoints")
        one, other = tensors(last), tensors(mine)
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == []
        assert (last / "state.json").read_text() == (mine / "state.json").read_text()
        left = [name for name in os.listdir(run / "checkpoints") if name.startswith(".")]
        assert left == []
        if metrics:
            assert curve(straight) == curve(run)


@contextmanager
def scene() -> Iterator[Scene]:
    """A folder that others may read, too; at the end everything in it is gone."""
    folder = Path(tempfile.mkdtemp(prefix="minigpt-faults-"))
    made = Scene(folder)
    try:
        folder.chmod(0o755)
        (folder / "logs").mkdir(mode=0o777)
        (folder / "logs").chmod(0o777)
        made.outside.write_text("a secret")
        (folder / "corpus").mkdir()
        for number, file in enumerate(sorted((ROOT / "minigpt_cli/data").glob("*.py"))):
            shutil.copy(file, folder / f"corpus/{number}.py")
        made.recipe.write_text(
            TINY.format(data=folder / "data")
            + f'[data.source]\nkind = "files"\npath = "{folder}/corpus/*.py"\nval_fraction = 0.2\n'
            + "[data.tokenizer]\ntrain_vocab = 320\n"
        )
        yield made
    finally:
        for each in made.started:
            each.kill_all()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def disk(where: Path, options: str) -> Iterator[Path]:
    """A disk of its own, in memory, e.g. with the options ``size=2m``.

    Raises:
        CannotTry: this user may not mount.
    """
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"mode=777,{options}", "none", str(where)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        raise CannotTry("mounting a disk needs root")
    try:
        yield where
    finally:
        subprocess.run(["umount", "--lazy", where], check=True)


def give_to_nobody(*paths: Path) -> None:
    """Root may write everywhere; so, where we are root, somebody else must be kept out."""
    if os.geteuid() == 0:
        for top in paths:
            for path in (top, *top.rglob("*")):
                os.chown(path, NOBODY, NOBODY)


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-????????"))


def lines(run: Path) -> list[dict[str, object]]:
    """metrics.jsonl: whole lines, whatever happened.

    Raises:
        ValueError: one is torn.
    """
    try:
        text = (run / "metrics.jsonl").read_text()
    except FileNotFoundError:
        return []
    assert not text or text.endswith("\n"), "the last line is torn"
    return [json.loads(line) for line in text.splitlines()]


def is_whole(checkpoint: Path) -> bool:
    """Every file of a checkpoint is what its manifest says, found out without minigpt."""
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in checkpoint.iterdir()
        if path.name != "manifest.json"
    }
    return bool(found == {name: entry["sha256"] for name, entry in files.items()})


def check_nothing_lost(run: Path, saved: list[int]) -> None:
    """After a kill: each checkpoint is whole, and the newest of those before it is there yet."""
    now = steps_saved(run)
    for path in (run / "checkpoints").glob("step-????????"):
        assert is_whole(path), path
    assert not saved or max(now, default=0) >= saved[-1], f"{saved} before the kill, {now} after"
    lines(run)
    if (run / "status.json").exists():
        json.loads((run / "status.json").read_text())


def tensors(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """(file, name) -> tensor: the shards of two ranks have the same names."""
    return {
        (path.name, name): tensor
        for path in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def copy_of(run: Path, place: Path) -> Path:
    return Path(shutil.copytree(run, place, ignore=shutil.ignore_patterns(".lock")))


def chance_of(seed: int, *names: object) -> random.Random:
    """Random moments that are the same for the same seed and fault."""
    return random.Random(f"{seed} {' '.join(map(str, names))}")
