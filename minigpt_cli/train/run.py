"""What the training loop works with."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from minigpt_cli.checkpoint.saver import Saver
from minigpt_cli.data.loader import BatchLoader, Sequences
from minigpt_cli.distributed.world import World
from minigpt_cli.huggingface.auxiliary_files import AuxiliaryFiles
from minigpt_cli.recipe import Recipe
from minigpt_cli.report.metrics import MetricsFile
from minigpt_cli.train.samples import Prompts
from minigpt_cli.train.step import StepContext


@dataclass(frozen=True)
class Validation:
    """The fixed windows that a run is evaluated on."""

    rows: Sequences
    token_bytes: NDArray[np.int32] | None
    bytes_per_token: float


@dataclass(frozen=True)
class Run:
    """All that fit() works with, made by setup."""

    recipe: Recipe
    directory: Path
    world: World
    context: StepContext
    batches: BatchLoader
    validation: Validation | None  # None where the dataset has no validation split
    prompts: Prompts
    metrics: MetricsFile | None  # opened by rank 0 when all else is ready
    saver: Saver
    tokenizer_json: bytes
    auxiliary_files: AuxiliaryFiles
    flops_per_token: int
    peak_flops: float | None
    resources: ExitStack  # the run directory's lock, open files, the reading thread
