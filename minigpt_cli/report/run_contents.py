"""Read a run directory for its report: finished, running or dead, whole or in parts."""

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from minigpt_cli.checkpoint.manifest import CheckpointManifest, read_checkpoint_manifest
from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.core.reading import read_json
from minigpt_cli.core.run_dir import (
    CHECKPOINTS,
    ENVIRONMENT,
    METRICS,
    RECIPE,
    STATE,
    STATUS,
    checkpoint_step,
    checkpoints_dir,
    run_of,
)
from minigpt_cli.core.status import read_status
from minigpt_cli.data.dataset_manifest import (
    DatasetManifest,
    is_dataset,
    read_dataset_manifest,
)
from minigpt_cli.recipe import Recipe, load_recipe
from minigpt_cli.report.curves import AXES, TRAINED, VALIDATED, Metrics, read_metrics
from minigpt_cli.report.incident_list import Incident, list_incidents
from minigpt_cli.report.sample_list import PromptSamples, list_samples

Content = TypeVar("Content")
_EMPTY = Metrics(
    {key: np.empty(0) for key in (*AXES, *TRAINED, "time")},
    {key: np.empty(0) for key in (*AXES, *VALIDATED)},
)


@dataclass(frozen=True)
class SavedStep:
    """A checkpoint in checkpoints/.

    Attributes:
        step: of its name.
        name: of its directory.
        manifest: None if it can't be read; the files that it lists were not compared with it.
        problem: why the manifest can't be read.
        saved: when, in s since 1970.
    """

    step: int
    name: str
    manifest: CheckpointManifest | None
    problem: str
    saved: float


@dataclass(frozen=True)
class RunContents:
    """What is known of a run. A part that is missing or can't be read is empty or None.

    Attributes:
        path: the run directory, as the user names it.
        name: unique among the runs of a report.
        recipe: the resolved recipe.
        state: finished, running, killed, stopped, diverged, failed or unknown.
        status: the content of status.json.
        environment: the content of environment.json.
        metrics: of all logged steps.
        incidents: by step.
        checkpoints: by step.
        samples: by prompt.
        dataset: the manifest of the recipe's dataset, if it is here.
        fingerprints: of the data that the last checkpoint was trained on.
        problems: a line for each part that can't be read.
    """

    path: Path
    name: str
    recipe: Recipe | None = None
    state: str = "unknown"
    status: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    metrics: Metrics = _EMPTY
    incidents: list[Incident] = field(default_factory=list)
    checkpoints: list[SavedStep] = field(default_factory=list)
    samples: list[PromptSamples] = field(default_factory=list)
    dataset: DatasetManifest | None = None
    fingerprints: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def runs_by_name(paths: list[Path]) -> dict[str, Path]:
    """Return the run directories that a user names, by names that differ.

    Args:
        paths: runs, or checkpoints in them. One that is named again is left out.

    Raises:
        UserError: one is no run.
    """
    runs: dict[str, Path] = {}
    for path in paths:
        _check_is_run(run := run_of(path), path)
        runs.setdefault(os.path.realpath(run), run)
    last = [Path(os.path.abspath(run)).name for run in runs.values()]
    unique = len({*last}) == len(last)
    return {
        name if unique else str(run): run for name, run in zip(last, runs.values(), strict=True)
    }


def read_run(path: Path, name: str) -> RunContents:
    """Read everything that a report shows of a run."""
    problems: list[str] = []

    def part(read: Callable[[], Content], empty: Content) -> Content:
        try:
            return read()
        except UserError as error:
            problems.append(str(error).partition("\n")[0])
        except OSError as error:
            problems.append(f"{error.filename or path}: {error.strerror or error}")
        return empty

    def environment() -> dict[str, Any]:
        return read_json(path / ENVIRONMENT, Damaged)

    recipe = None
    if os.path.lexists(path / RECIPE):
        recipe = part(lambda: load_recipe(path / RECIPE, name=path.name), None)
    else:
        problems.append(f"{path / RECIPE}: is missing")
    incidents, unread = list_incidents(path)
    problems += unread
    status = read_status(path)
    checkpoints: list[SavedStep] = part(lambda: _checkpoints(path), [])
    return RunContents(
        path=path,
        name=name,
        recipe=recipe,
        state=_state(status),
        status=status,
        environment=part(environment, {}) if os.path.lexists(path / ENVIRONMENT) else {},
        metrics=part(lambda: read_metrics(path), _EMPTY),
        incidents=incidents,
        checkpoints=checkpoints,
        samples=part(lambda: list_samples(path), []),
        dataset=part(lambda: _dataset(path, recipe), None),
        fingerprints=_fingerprints(path, checkpoints),
        problems=problems,
    )


def _check_is_run(run: Path, path: Path) -> None:
    if any(os.path.lexists(run / name) for name in (RECIPE, METRICS, CHECKPOINTS, STATUS)):
        return
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such run")
    if not run.is_dir():
        raise UserError(f"{path}: is a file; name a run directory")
    inner = sorted(each.parent for each in path.glob(f"*/{RECIPE}"))
    if len(inner) == 1:
        raise UserError(f"{path}: is no run, but 1 is in it: name it: {inner[0]}")
    if inner:
        raise UserError(
            f"{path}: is no run, but {len(inner)} are in it: name them, such as {inner[0]}"
        )
    raise UserError(f"{path}: is no run: it holds no {RECIPE}; name a run directory")


def _state(status: dict[str, Any]) -> str:
    """Return how a run is, or ended. A process that is gone can't have said so itself."""
    name, pid = status.get("status"), status.get("pid")
    if name not in ("running", "finished", "stopped", "diverged", "failed"):
        return "unknown"
    is_here = status.get("host") == socket.gethostname() and type(pid) is int
    if name == "running" and is_here and not os.path.exists(f"/proc/{pid}"):
        return "killed"
    return name


def _checkpoints(run: Path) -> list[SavedStep]:
    found = []
    for path in checkpoints_dir(run).glob("step-*"):
        step = checkpoint_step(path)
        if step is None or not path.is_dir():
            continue
        manifest, problem = None, ""
        try:
            saved = path.stat().st_mtime
            manifest = read_checkpoint_manifest(path)
        except OSError:
            continue
        except Damaged as error:
            if not path.exists():  # pruned meanwhile
                continue
            problem = str(error)
        found.append(SavedStep(step, path.name, manifest, problem, saved))
    return sorted(found, key=lambda each: each.step)


def _dataset(run: Path, recipe: Recipe | None) -> DatasetManifest | None:
    """Read the manifest of the dataset; relative to here, or to where RUN is runs/NAME."""
    if recipe is not None:
        for folder in (Path(), run.parent.parent):
            if is_dataset(folder / recipe.data_path):
                return read_dataset_manifest(folder / recipe.data_path)
    return None


def _fingerprints(run: Path, checkpoints: list[SavedStep]) -> dict[str, Any]:
    try:
        state = read_json(checkpoints_dir(run) / checkpoints[-1].name / STATE)
    except (IndexError, UserError):
        return {}
    found = state.get("dataset")
    return found if isinstance(found, dict) else {}
