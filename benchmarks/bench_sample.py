"""Sampling on a CPU, against transformers: ``python benchmarks/bench_sample.py --json FILE``.

GPT-2 124M with random weights, prompts of 32 tokens, greedy, in float32 and bf16, with 1 and 16
prompts at once. transformers runs in an environment of its own (``--peer-python``), on the same
weights, after a check that both write the same tokens in float32. The two processes take turns.
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

PROMPT_TOKENS = 32
CASES = [(dtype, batch) for dtype in ("float32", "bfloat16") for batch in (1, 16)]
Generate = Callable[[list[list[int]], int], list[list[int]]]  # prompts, tokens -> new tokens


def ours(folder: str, dtype: str) -> Generate:
    import torch

    from minigpt_cli.generate.engine import generate_each
    from minigpt_cli.generate.packed import pack_weights
    from minigpt_cli.generate.sampling import SamplingOptions
    from minigpt_cli.huggingface.weights import open_weights
    from minigpt_cli.model.gpt import GPT, copy_values
    from minigpt_cli.model.hf_names import config_from_huggingface

    place = Path(folder)
    config = config_from_huggingface(json.loads((place / "config.json").read_text()), folder)
    weights, model = open_weights(place, config), GPT(config).eval()
    for name, parameter in model.named_parameters():
        copy_values(parameter, weights.read(name))
    model.to(getattr(torch, dtype))
    pack_weights(model)

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        steps = generate_each(
            model, prompts, SamplingOptions(temperature=0.0), max_new_tokens=tokens,
            finished=[False] * len(prompts),
        )  # fmt: skip
        return [list(row) for row in zip(*steps, strict=True)]  # type: ignore[arg-type]

    return generate


def theirs(folder: str, dtype: str) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).to(getattr(torch, dtype)).eval()

    def generate(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        ids = torch.tensor(prompts)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        rows: list[list[int]] = found[:, ids.shape[1] :].tolist()
        return rows

    return generate


def serve(which: str, folder: str) -> None:
    """Answer each line [dtype, batch, new tokens] with [seconds, the new tokens]."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    load = {"ours": ours, "theirs": theirs}[which]
    made = {dtype: load(folder, dtype) for dtype in ("float32", "bfloat16")}
    print(json.dumps(versions()), flush=True)
    for line in sys.stdin:
        dtype, batch, tokens = json.loads(line)
        prompts = torch.randint(
            50_257, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(batch)
        ).tolist()
        began = time.perf_counter()
        written = made[dtype](prompts, tokens)
        print(json.dumps([time.perf_counter() - began, written]), flush=True)


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Server:
    """A process that has loaded the weights and waits for work."""

    def __init__(self, which: str, python: str, folder: str, threads: int):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        if which == "ours":
            environment["THP_MEM_ALLOC_ENABLE"] = "1"  # as `minigpt sample` sets it
        self.process = subprocess.Popen(
            [python, __file__, "--serve", which, folder], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.versions = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(map(str, self.process.args))} ended")  # type: ignore[arg-type]
        return json.loads(line)

    def generate(self, dtype: str, batch: int, tokens: int) -> tuple[float, list[list[int]]]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([dtype, batch, tokens]) + "\n")
        self.process.stdin.flush()
        seconds, written = self._answer()
        return seconds, written

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def write_model(folder: str) -> None:
    """Write GPT-2 124M with random weights, in transformers' format."""
    import torch

    from minigpt_cli.huggingface.export import write_safetensors
    from minigpt_cli.model.config import model_config
    from minigpt_cli.model.gpt import GPT, initialize_weights
    from minigpt_cli.model.hf_names import huggingface_config, huggingface_name, is_transposed

    config = model_config(
        family="gpt2", vocab_size=50_257, hidden_size=768, num_hidden_layers=12,
        num_attention_heads=12, max_position_embeddings=1024,
    )  # fmt: skip
    model = GPT(config)
    initialize_weights(model, seed=1)
    tensors = {
        huggingface_name(config, name): p.detach().T if is_transposed(config, name) else p.detach()
        for name, p in model.named_parameters()
    }
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    write_safetensors(Path(folder, "model.safetensors"), shapes, torch.float32, tensors.values())
    settings = huggingface_config(config, {}, "float32")
    Path(folder, "config.json").write_text(json.dumps(settings))


def measure(peer: str | None, rounds: int, tokens: int, threads: int) -> dict[str, Any]:
    """Return every raw sample (tokens per second), and the medians and their ratios."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder)
        servers = {"minigpt": Server("ours", sys.executable, folder, threads)}
        if peer is not None:
            servers["transformers"] = Server("theirs", peer, folder, threads)
        found: dict[str, Any] = {
            "model": "gpt2 124M, random weights", "new_tokens": tokens, "threads": threads,
            "prompt_tokens": PROMPT_TOKENS,
            "versions": {name: server.versions for name, server in servers.items()},
        }  # fmt: skip
        rows = []
        for dtype, batch in CASES:
            written = {name: s.generate(dtype, batch, tokens)[1] for name, s in servers.items()}
            if peer is not None and dtype == "float32":
                assert written["minigpt"] == written["transformers"], "they write other tokens"
            samples: dict[str, list[float]] = {name: [] for name in servers}
            for _ in range(rounds):
                for name, server in servers.items():
                    seconds, _ = server.generate(dtype, batch, tokens)
                    samples[name].append(batch * tokens / seconds)
            medians = {name: statistics.median(each) for name, each in samples.items()}
            row = {"dtype": dtype, "batch": batch, "tokens_per_second": samples, "median": medians}
            if peer is None:
                row["transformers"] = "not measured"
            else:
                row["ratio"] = medians["minigpt"] / medians["transformers"]
            rows.append(row)
        for server in servers.values():
            server.close()
    return found | {"rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer-python", help="of an environment with transformers")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve is not None:
        serve(*a.serve)
        return
    result = json.dumps(measure(a.peer_python, a.rounds, a.new_tokens, a.threads))
    if a.json is not None:
        a.json.write_text(result + "\n")
    print(result)


if __name__ == "__main__":
    main()
