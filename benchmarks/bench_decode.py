"""Time the sampling of GPT-2 124M with random weights on this device; prints one JSON line.

python benchmarks/bench_decode.py
"""

import argparse
import json
import time

import torch

from minigpt_cli.distributed.device import device_name, find_device
from minigpt_cli.generate.engine import generate
from minigpt_cli.generate.sampling import SamplingOptions
from minigpt_cli.model.config import model_config
from minigpt_cli.model.gpt import GPT, initialize_weights
from minigpt_cli.model.precision import compute_dtype
from minigpt_cli.recipe import PrecisionSettings

NEW_TOKENS = 256


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="a tiny model")
    parser.add_argument("--cudnn", action=argparse.BooleanOptionalAction, default=True)
    a = parser.parse_args()
    torch.backends.cuda.enable_cudnn_sdp(a.cudnn)
    device = find_device()
    hidden, layers, tokens = (64, 2, 16) if a.small else (768, 12, NEW_TOKENS)
    config = model_config(
        family="gpt2", vocab_size=50304, hidden_size=hidden, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, max_position_embeddings=1024,
    )  # fmt: skip
    model = GPT(config).to(device).eval()
    initialize_weights(model, 0)
    dtype = compute_dtype(PrecisionSettings(), device)

    def seconds(samples: int) -> float:
        began = time.perf_counter()
        steps = generate(
            model, [1, 2, 3, 4], SamplingOptions(top_k=50), max_new_tokens=tokens,
            num_samples=samples, dtype=dtype,
        )  # fmt: skip
        assert len(list(steps)) == tokens
        return time.perf_counter() - began

    found = {}
    for samples in (1, 16):
        seconds(samples)
        times = [seconds(samples) for _ in range(1 if a.small else 3)]
        found[f"batch {samples}"] = {
            "seconds": times, "tokens_per_second": samples * tokens / sorted(times)[len(times) // 2]
        }  # fmt: skip
    print(
        json.dumps(
            {"device": device_name(device), "torch": torch.__version__, "dtype": str(dtype)} | found
        )
    )


if __name__ == "__main__":
    main()
