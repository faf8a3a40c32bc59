"""Time training steps of a model on random tokens; prints one JSON line.

python benchmarks/bench_train.py --batch 8 --sequence-length 256 --hidden 256 --layers 6
"""

import argparse
import json
import time

import torch

from minigpt_cli.data.loader import Batch
from minigpt_cli.distributed.device import device_name, find_device
from minigpt_cli.distributed.world import World
from minigpt_cli.model.cost import flops_per_token, parameter_count, peak_flops
from minigpt_cli.model.gpt import initialize_weights
from minigpt_cli.recipe.schema import (
    ModelSettings,
    OptimizerSettings,
    PrecisionSettings,
    Recipe,
    TrainSettings,
)
from minigpt_cli.train.step import train_step
from minigpt_cli.train.trainer import build_context, warm_up


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--family", default="gpt2")
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro-batch", type=int)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=20)
    a = parser.parse_args()

    recipe = Recipe(
        model=ModelSettings(
            family=a.family,
            hidden_size=a.hidden,
            num_hidden_layers=a.layers,
            num_attention_heads=a.heads,
        ),
        train=TrainSettings(
            global_batch_size=a.batch,
            sequence_length=a.sequence_length,
            micro_batch_size=a.micro_batch,
            deterministic=a.deterministic,
            seed=0,
        ),
        optimizer=OptimizerSettings(lr=3e-4, name=a.optimizer),
        precision=PrecisionSettings(dtype=a.dtype, compile=a.compile),
    )
    device = find_device()
    context = build_context(recipe, a.vocab, World(rank=0, size=1, device=device))
    initialize_weights(context.model, recipe.train.seed)
    warm_up(context, a.sequence_length)
    tokens = torch.randint(a.vocab, (a.batch, a.sequence_length + 1), device=device)
    times = []
    for step in range(a.steps + 5):
        began = time.perf_counter()
        loss, _ = train_step(context, Batch(tokens[:, :-1], tokens[:, 1:], None), step, 1.0)
        loss.item()
        times.append(time.perf_counter() - began)
    median = sorted(times[5:])[a.steps // 2]
    rate = a.batch * a.sequence_length / median
    peak = peak_flops(device_name(device))
    flops = flops_per_token(context.model.config, a.sequence_length)
    print(
        json.dumps(
            {
                **vars(a),
                "device": device_name(device),
                "torch": torch.__version__,
                "parameters": parameter_count(context.model.config),
                "median_step_seconds": median,
                "step_seconds": times[5:],
                "tokens_per_second": rate,
                "mfu": rate * flops / peak if peak else None,
                "peak_memory_bytes": torch.cuda.max_memory_allocated() if peak else None,
            }
        )
    )


if __name__ == "__main__":
    main()
