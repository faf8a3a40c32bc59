"""Measure how the cost of a training step grows with each size of a run.

    python -m benchmarks.growth [--only dataset ranks] [--out growth.json]

Prints a JSON line for each measurement, and writes all of them to a file as a list:

    {"what": "context", "x": 512, "seconds": 0.021, "samples": [...]}

``seconds`` is the median time of a step, with the reading of its batch. ``x`` counts parameters,
tokens of a sequence (context), sequences of a batch, tokens of the dataset (sparse files of up to
200 GB, in a temporary directory), or ranks of one machine (gloo, one thread each, one batch
divided among them). The sizes alternate, so that noise falls on all of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench_dataset import sparse_split
from minigpt_cli.data.dataset import TokenSplit, split_in_memory
from minigpt_cli.data.loader import BatchLoader, TokenSequences
from minigpt_cli.distributed.join import leave_world
from minigpt_cli.distributed.world import World, start_world
from minigpt_cli.model.cost import parameter_count
from minigpt_cli.model.gpt import initialize_weights
from minigpt_cli.recipe.schema import ModelSettings, OptimizerSettings, Recipe, TrainSettings
from minigpt_cli.train.step import StepContext, train_step
from minigpt_cli.train.trainer import build_context, warm_up
from tests.helpers.processes import ROOT
from tests.helpers.ranks import free_port, rank_environment

VOCAB = 1024
ROUNDS, STEPS = 5, 4  # steps in a row, in each round
WIDTHS = ((64, 2), (128, 4), (192, 6), (256, 8), (384, 8))  # hidden size, layers
CONTEXTS = (64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
DATASETS = (10**6, 10**7, 10**8, 10**9, 10**10, 10**11)
RANKS = (1, 2, 4)

Steps = Callable[[int], list[float]]


def build_recipe(hidden: int = 128, layers: int = 4, batch: int = 4, context: int = 128) -> Recipe:
    return Recipe(
        model=ModelSettings(
            family="llama",
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
        ),
        train=TrainSettings(global_batch_size=batch, sequence_length=context, seed=0),
        optimizer=OptimizerSettings(lr=1e-4),
    )


def random_split() -> TokenSplit:
    tokens = np.random.default_rng(0).integers(0, VOCAB, 10**6).astype(np.uint16)
    return split_in_memory(tokens, vocab_size=VOCAB, eos_id=0)


def prepare_steps(recipe: Recipe, split: TokenSplit, world: World) -> tuple[StepContext, Steps]:
    """Build a model and its loader.

    Returns:
        (the model's context, a function: number of steps -> seconds of each of them).
    """
    context = build_context(recipe, VOCAB, world)
    initialize_weights(context.model, 0)
    train = recipe.train
    warm_up(context, train.sequence_length)
    own = train.global_batch_size // world.size
    loader = BatchLoader(
        TokenSequences(split, train.sequence_length),
        seed=0,
        global_batch_size=train.global_batch_size,
        local_slice=slice(world.rank * own, (world.rank + 1) * own),
        device=world.device,
    )
    done = 0

    def steps(count: int) -> list[float]:
        nonlocal done
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            loss, _ = train_step(context, loader(done), done, 1.0)
            loss.item()
            seconds.append(time.perf_counter() - began)
            done += 1
        return seconds

    steps(2)
    return context, steps


def alternate(what: str, sizes: dict[int, Steps]) -> list[dict[str, Any]]:
    samples: dict[int, list[float]] = {x: [] for x in sizes}
    for _ in range(ROUNDS):
        for x, steps in sizes.items():
            samples[x] += steps(STEPS)
    return [row(what, x, seconds) for x, seconds in samples.items()]


def row(what: str, x: int, samples: list[float]) -> dict[str, Any]:
    found = {"what": what, "x": x, "seconds": statistics.median(samples), "samples": samples}
    print(json.dumps(found), flush=True)
    return found


def by_parameters(world: World) -> list[dict[str, Any]]:
    sizes = {}
    for hidden, layers in WIDTHS:
        context, steps = prepare_steps(build_recipe(hidden, layers), random_split(), world)
        sizes[parameter_count(context.model.config)] = steps
    return alternate("parameters", sizes)


def by_context(world: World) -> list[dict[str, Any]]:
    split = random_split()
    recipes = {x: build_recipe(batch=1, context=x) for x in CONTEXTS}
    return alternate("context", {x: prepare_steps(r, split, world)[1] for x, r in recipes.items()})


def by_batch(world: World) -> list[dict[str, Any]]:
    split = random_split()
    recipes = {x: build_recipe(batch=x) for x in BATCHES}
    return alternate("batch", {x: prepare_steps(r, split, world)[1] for x, r in recipes.items()})


def by_dataset(world: World) -> list[dict[str, Any]]:
    """The model is small, so that reading would show."""
    recipe = build_recipe(hidden=64, layers=2, batch=8, context=256)
    with tempfile.TemporaryDirectory() as folder:
        splits = {x: sparse_split(Path(folder, str(x)), x) for x in DATASETS}
        sizes = {x: prepare_steps(recipe, split, world)[1] for x, split in splits.items()}
        return alternate("dataset", sizes)


def by_ranks(world: World) -> list[dict[str, Any]]:
    del world
    samples: dict[int, list[float]] = {x: [] for x in RANKS}
    for _ in range(2):
        for count in RANKS:
            samples[count] += steps_on_ranks(count)
    return [row("ranks", x, seconds) for x, seconds in samples.items()]


def steps_on_ranks(count: int) -> list[float]:
    """Start this many ranks and return the seconds of their steps."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.growth", "--as-rank"]
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, env=rank_environment(rank, count, port), stdout=subprocess.PIPE
        )
        for rank in range(count)
    ]
    try:
        output = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert not any(process.returncode for process in ranks), "a rank failed"
    seconds: list[float] = json.loads(output[0])
    return seconds


def run_as_rank() -> None:
    world = start_world()
    _, steps = prepare_steps(build_recipe(batch=16), random_split(), world)
    seconds = steps(ROUNDS * STEPS // 2)
    if world.rank == 0:
        print(json.dumps(seconds), flush=True)
    leave_world(patience=30)
    os._exit(0)  # gloo's threads may abort the interpreter at its exit


MEASUREMENTS: dict[str, Callable[[World], list[dict[str, Any]]]] = {
    "parameters": by_parameters,
    "context": by_context,
    "batch": by_batch,
    "dataset": by_dataset,
    "ranks": by_ranks,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--out", type=Path, help="a JSON file for all rows")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.as_rank:
        run_as_rank()
    world = start_world()
    rows = [each for name in options.only for each in MEASUREMENTS[name](world)]
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
