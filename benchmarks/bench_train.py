"""Time training steps of a model on random tokens; prints one JSON line.

python benchmarks/bench_train.py --batch 8 --sequence-length 256 --hidden 256 --layers 6
"""

import argparse
import json
import time

import torch

from minigpt_cli.data.loader import Batch
from minigpt_cli.distributed.device import device_name, find_device, use_deterministic_kernels
from minigpt_cli.distributed.parallel import ParallelDims
from minigpt_cli.distributed.world import World
from minigpt_cli.model import precision
from minigpt_cli.model.config import model_config
from minigpt_cli.model.cost import flops_per_token, parameter_count, peak_flops
from minigpt_cli.model.gpt import GPT, initialize_weights
from minigpt_cli.recipe import OptimizerSettings, PrecisionSettings
from minigpt_cli.train import guard, optimizer
from minigpt_cli.train.step import StepContext, train_step
from minigpt_cli.train.trainer import compile_blocks, warm_up


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

    device = find_device()
    if a.deterministic:
        use_deterministic_kernels(device, a.compile)
    config = model_config(
        family=a.family,
        vocab_size=a.vocab,
        hidden_size=a.hidden,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        max_position_embeddings=a.sequence_length,
    )
    model = GPT(config).to(device)
    initialize_weights(model, 0)
    if a.compile:
        compile_blocks(model)
    dtype = precision.compute_dtype(PrecisionSettings(dtype=a.dtype), device)
    trainer = StepContext(
        model=model,
        forward=model,
        parallel_dims=ParallelDims("single", World(rank=0, size=1, device=device)),
        optimizers=optimizer.build(model, OptimizerSettings(lr=3e-4, name=a.optimizer)),
        scaler=precision.grad_scaler(dtype, device),
        guard=guard.new_guard(device),
        dtype=dtype,
        seed=0,
        micro_batch_size=a.micro_batch or a.batch,
        clip_norm=1.0,
        dropout=False,
    )
    warm_up(trainer, a.sequence_length)
    tokens = torch.randint(a.vocab, (a.batch, a.sequence_length + 1), device=device)
    times = []
    for step in range(a.steps + 5):
        began = time.perf_counter()
        loss, _ = train_step(trainer, Batch(tokens[:, :-1], tokens[:, 1:], None), step, 1.0)
        loss.item()
        times.append(time.perf_counter() - began)
    median = sorted(times[5:])[a.steps // 2]
    rate = a.batch * a.sequence_length / median
    peak = peak_flops(device_name(device))
    print(
        json.dumps(
            {
                **vars(a),
                "device": device_name(device),
                "torch": torch.__version__,
                "parameters": parameter_count(config),
                "median_step_seconds": median,
                "tokens_per_second": rate,
                "mfu": rate * flops_per_token(config, a.sequence_length) / peak if peak else None,
                "peak_memory_bytes": torch.cuda.max_memory_allocated() if peak else None,
            }
        )
    )


if __name__ == "__main__":
    main()
