"""Time training steps of a model on random tokens; prints one JSON line.

python benchmarks/bench_train.py --batch 8 --sequence-length 256 --hidden 256 --layers 6

On a GPU a step is timed between two CUDA events, and the host doesn't wait for it, as in a run.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

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

WARM_UP_STEPS = 5
PROFILED_STEPS = 2


def step_times(step: Callable[[], Tensor], steps: int, device: torch.device) -> list[float]:
    """Return the seconds of each step."""
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        torch.cuda.synchronize()
        return [one.elapsed_time(next_) / 1000 for one, next_ in itertools.pairwise(events)]
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step().item()
        times.append(time.perf_counter() - began)
    return times


def profiled(step: Callable[[], Tensor], device: torch.device) -> dict[str, Any]:
    """Return attention's operators, and the kernels that take most of a step: ms and calls."""
    on_gpu = device.type == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as found:
        for _ in range(PROFILED_STEPS):
            step().item()
    events = found.key_averages()
    kernels = [each for each in events if each.device_type.name == "CUDA"] if on_gpu else events
    microseconds = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = sorted(kernels, key=lambda each: -getattr(each, microseconds))
    return {
        "attention": sorted(
            each.key
            for each in events
            if each.key.startswith("aten::_scaled_dot_product_") and "backward" not in each.key
        ),
        "kernels": [
            {
                "name": each.key[:120],
                "ms": getattr(each, microseconds) / 1000 / PROFILED_STEPS,
                "calls": each.count / PROFILED_STEPS,
            }
            for each in kernels[:25]
        ],
    }


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
    parser.add_argument("--profile", action="store_true", help="add a table of kernels")
    parser.add_argument("--cudnn", action=argparse.BooleanOptionalAction, default=True,
                        help="whether torch may use cuDNN for attention")  # fmt: skip
    a = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(a.cudnn)

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
    batch, numbers = Batch(tokens[:, :-1], tokens[:, 1:], None), itertools.count()

    def step() -> Tensor:
        return train_step(context, batch, next(numbers), 1.0)[0]

    step_times(step, WARM_UP_STEPS, device)
    began = time.perf_counter()
    times = step_times(step, a.steps, device)
    seconds = time.perf_counter() - began
    peak_memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    median = sorted(times)[a.steps // 2]
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
                "step_seconds": times,
                "tokens_per_second": rate,
                "mfu": rate * flops / peak if peak else None,
                "mean_seconds_by_the_clock": seconds / a.steps,
                "peak_memory_bytes": peak_memory,
                **(profiled(step, device) if a.profile else {}),
            }
        )
    )


if __name__ == "__main__":
    main()
