"""How long a save holds training up: synchronous and asynchronous, on a model of 100 M parameters.

    python benchmarks/bench_save.py

Prints one JSON object. The state (weights and AdamW's moments, 12 bytes per parameter) is written
to --directory. Training is blocked while the state is checked and ``Saver.start`` runs.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from minigpt_cli.checkpoint.saver import Saver
from minigpt_cli.checkpoint.tensors import tensors_of
from minigpt_cli.distributed.world import start_world
from minigpt_cli.model.cost import parameter_count
from minigpt_cli.model.gpt import initialize_weights
from minigpt_cli.recipe.schema import (
    CheckpointSettings,
    ModelSettings,
    OptimizerSettings,
    Recipe,
    TrainSettings,
)
from minigpt_cli.train.checkpointing import all_finite
from minigpt_cli.train.trainer import build_context


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=19_500)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=None)
    a = parser.parse_args()
    recipe = Recipe(
        model=ModelSettings(
            family="gpt2",
            hidden_size=a.hidden,
            num_hidden_layers=a.layers,
            num_attention_heads=12,
        ),
        train=TrainSettings(global_batch_size=8, sequence_length=1024),
        optimizer=OptimizerSettings(lr=1e-4),
    )
    world = start_world()
    context = build_context(recipe, a.vocab, world)
    initialize_weights(context.model, 0)
    directory = Path(tempfile.mkdtemp(dir=a.directory))
    result = {"parameters": parameter_count(context.model.config), "device": str(world.device)}
    try:
        for kind in ("synchronous", "asynchronous"):
            keep = CheckpointSettings(keep_last=1, asynchronous=kind == "asynchronous")
            saver = Saver(directory / kind, world, keep)
            (directory / kind).mkdir()
            blocked, whole = [], []
            for step in range(1, a.repeat + 2):
                began = time.perf_counter()
                tensors = tensors_of(context.model, context.optimizers)
                assert all_finite(list(tensors.values()))  # as before every save
                saver.start(step, tensors, {"state.json": b"{}"}, None)
                if not keep.asynchronous:
                    saver.wait()
                blocked.append(time.perf_counter() - began)
                if keep.asynchronous:
                    saved = saver.wait()
                    assert saved is not None
                    assert saved.problem is None
                whole.append(time.perf_counter() - began)
                torch.cuda.empty_cache()
            saver.close()
            # The first makes the memory that the copies go to.
            result[kind] = {
                "first_blocked_seconds": round(blocked[0], 3),
                "blocked_seconds": round(statistics.median(blocked[1:]), 3),
                "blocked_samples": blocked[1:],
                "whole_seconds": round(statistics.median(whole[1:]), 3),
            }
    finally:
        shutil.rmtree(directory)
    ratio = result["asynchronous"]["blocked_seconds"] / result["synchronous"]["blocked_seconds"]
    print(json.dumps(result | {"ratio": round(ratio, 3)}))


if __name__ == "__main__":
    main()
