"""Data that goes bad on purpose, and what a run then writes down."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_cli.data.order import sample_ids

LENGTH, BATCH, SEED = 32, 8, 1337  # of the tiny recipe
SPIKES = ("guard.spike_sigma=6", "guard.spike_window=16", "data.verify=false", "train.steps=40",
          "checkpoint.every_steps=10", "eval.every_steps=100", "precision.dtype=fp32",
          "optimizer.lr=7e-3", "optimizer.muon_lr=1.5e-2")  # fmt: skip


def poisoned(
    dataset: Path,
    to: Path,
    positions: Iterable[int],
    token: int | None = None,
    rows: slice = slice(None),
) -> Path:
    """A copy of a dataset in which the batches at these places in the order (from 0), or these rows
    of them, are uniform noise, or ``token`` again and again; no other batch holds any of it."""
    shutil.copytree(dataset, to)
    file = to / "train-00000.npy"
    tokens = np.load(file)
    windows = (len(tokens) - 1) // LENGTH
    noise = np.random.default_rng(0)
    for position in positions:
        for window in sample_ids(SEED, position, BATCH, windows)[rows]:
            inner = slice(
                window * LENGTH + 1, (window + 1) * LENGTH
            )  # the ends are the neighbours'
            tokens[inner] = noise.integers(0, 290, LENGTH - 1) if token is None else token
    np.save(file, tokens)
    return to


def unused_token(dataset: Path) -> int:
    counts = np.bincount(np.load(dataset / "train-00000.npy"), minlength=300)
    return int(np.flatnonzero(counts == 0)[0])


def incidents(run: Path, kind: str = "*") -> list[dict[str, Any]]:
    files = sorted((run / "incidents").glob(f"*-{kind}.json"))
    return [json.loads(file.read_text()) for file in files]
