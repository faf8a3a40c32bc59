"""The names of all files and directories in a run directory."""

import os
import re
from pathlib import Path

# Beside the checkpoints.
RECIPE = "recipe.toml"  # the resolved recipe; also in each checkpoint
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"  # completions of [eval] prompts
TOKENIZER = "tokenizer.json"  # also in each checkpoint, and in a token dataset
ENVIRONMENT = "environment.json"
STATUS = "status.json"
TENSORBOARD = "tensorboard"  # of [log] trackers, as the next two
WANDB = "wandb"
TRACKIO = "trackio"
LOCK = ".lock"
INCIDENTS = "incidents"
FINAL = "final"  # the export of the last checkpoint

# In a checkpoint.
CHECKPOINTS = "checkpoints"
STATE = "state.json"
AUXILIARY_FILES = "huggingface.json"  # of the model that the run started from
CHECKPOINT_MANIFEST = "manifest.json"

# All that a run writes, except its locks.
RUN_FILES = (
    RECIPE,
    METRICS,
    SAMPLES,
    TOKENIZER,
    ENVIRONMENT,
    STATUS,
    TENSORBOARD,
    WANDB,
    TRACKIO,
    INCIDENTS,
    FINAL,
    CHECKPOINTS,
)

_STEP = re.compile(r"step-(\d{8,})$")


def tracker_lock(run: Path, tracker: str) -> Path:
    """Return the file that a tracker's process locks: one at a time writes for a run."""
    return run / f".{tracker}.lock"


def checkpoints_dir(run: Path) -> Path:
    """Return the directory that holds a run's checkpoints."""
    return run / CHECKPOINTS


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the directory of the checkpoint at ``step``."""
    return checkpoints_dir(run) / f"step-{step:08d}"


def checkpoint_step(checkpoint: Path) -> int | None:
    """Return the step in the name of a checkpoint's directory; None for any other name."""
    match = _STEP.match(checkpoint.name)
    return int(match[1]) if match else None


def is_checkpoint(path: Path) -> bool:
    """Return whether ``path`` is a checkpoint, valid or damaged, and not a run directory."""
    return checkpoint_step(path) is not None or (path / CHECKPOINT_MANIFEST).exists()


def run_of(path: Path) -> Path:
    """Return the run directory of a path: a run, its checkpoints/, or one checkpoint.

    A relative path gives a relative one, unless that has no name, as . and .. have none.
    """
    run = Path(os.path.abspath(path))
    if is_checkpoint(run):
        run = run.parent.parent
    elif run.name == CHECKPOINTS:
        run = run.parent
    relative = Path(os.path.relpath(run))
    return run if path.is_absolute() or relative.name in ("", "..") else relative
