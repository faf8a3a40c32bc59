"""The parts of gpu_check.py, in order of value. Each yields (name, result) as it goes."""

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu_commands import Check, Part

Results = Iterator[tuple[str, dict[str, Any]]]
FASTEST = "vocabulary 50304, compiled"  # of the steps: the one that the real run is compared with

# A vocabulary of 4,096 takes seconds to train, and is padded to GPT-2's size, so that a step costs
# what GPT-2's does.
RECIPE = """
[data]
path = "{folder}/data"
[data.source]
kind = "python-stdlib"
[data.tokenizer]
train_vocab = 4096
[model]
family = "gpt2"
hidden_size = {hidden}
num_hidden_layers = {layers}
num_attention_heads = {heads}
vocab_size = 50304
[train]
steps = 40
global_batch_size = {batch}
sequence_length = {length}
deterministic = {deterministic}
[optimizer]
lr = 6e-4
[schedule]
warmup_steps = 10
[precision]
compile = true
[checkpoint]
every_steps = 20
every_minutes = 0
keep_last = 100
[eval]
windows = 32
"""
SMALL = {"hidden": 64, "layers": 2, "heads": 4, "batch": 4, "length": 64}
MEDIUM = {"hidden": 384, "layers": 6, "heads": 6, "batch": 32, "length": 256}
GPT2 = {"hidden": 768, "layers": 12, "heads": 12, "batch": 32, "length": 1024}


def machine(check: Check) -> Results:
    """Driver, topology and versions."""
    for name, command in {
        "nvidia-smi": ("nvidia-smi",),
        "clocks": ("nvidia-smi", "-q", "-d", "CLOCK,POWER,TEMPERATURE"),
        "topology": ("nvidia-smi", "topo", "-m"),
    }.items():
        try:
            yield name, {"output": check.run(*command).output}
        except FileNotFoundError:
            yield name, {"skipped": "there is no nvidia-smi"}
    yield "torch", {"output": check.python("-m", "torch.utils.collect_env").output}
    yield "doctor", {"output": check.minigpt("doctor").output}


def tests(check: Check) -> Results:
    """The tests marked gpu."""
    done = check.python("-m", "pytest", "-m", "gpu", "tests/gpu", "-v", "-rfE")
    lines = done.output.splitlines()
    wrong = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    yield "tests/gpu", {**done.result, "wrong": wrong, "summary": (lines or [""])[-1]}


def steps(check: Check) -> Results:
    """Steps of GPT-2 124M: vocabulary, compiled, deterministic; kernels and attention's backend."""
    size = _sizes(check, GPT2)
    shape = ("--hidden", size["hidden"], "--layers", size["layers"], "--heads", size["heads"],
             "--batch", size["batch"], "--sequence-length", size["length"])  # fmt: skip
    for vocabulary, deterministic, compiled in itertools.product(
        (50304, 50257), (False, True), (True, False)
    ):
        name = f"vocabulary {vocabulary}, {'compiled' if compiled else 'eager'}"
        yield f"{name}{', deterministic' if deterministic else ''}", check.python(
            "benchmarks/bench_train.py", "--vocab", vocabulary, *shape, "--profile",
            "--deterministic" if deterministic else "--no-deterministic",
            *(["--compile"] if compiled else []), *([] if check.cudnn else ["--no-cudnn"]),
            *(["--steps", 3] if check.small else []),
        ).result  # fmt: skip


def pretrain(check: Check) -> Results:
    """A real run of GPT-2 124M: the loop's cost, the stall of a save, memory against the plan."""
    recipe = _recipe(check, GPT2, deterministic=not check.cudnn)
    yield "plan", (planned := check.minigpt("plan", recipe, "--json").result)
    run = check.folder / "run"
    yield "run", check.minigpt("pretrain", recipe, "--out", run).result
    lines = {line["step"]: line for line in _metrics(run) if "loss" in line}
    if 40 not in lines:
        return
    while_saving, alone = (lines[s]["seconds"] - lines[s - 10]["seconds"] for s in (30, 40))
    found: dict[str, Any] = {
        "step_seconds": alone / 10,
        "step_seconds_while_a_save_is_written": while_saving / 10,
        "save_stall_seconds": lines[30]["time"] - lines[20]["time"] - while_saving,
        "peak_memory_bytes": max(line["memory_bytes"] for line in lines.values()),
        "lines": list(lines.values()),
    }
    benchmark = check.results.get("steps", {}).get(FASTEST, {}).get("result")
    if benchmark is not None:
        found["step_seconds_of_the_benchmark"] = benchmark["median_step_seconds"]
    if "result" in planned:
        strategies = planned["result"]["model"]["strategies"]
        found["planned_memory_bytes"] = next(
            each["memory"]["peak"] for each in strategies if each["is_chosen"]
        )
    yield "compared", found


def resume(check: Check) -> Results:
    """kill -9, then resume in a new process with an empty compile cache: the same bits."""
    recipe = _recipe(check, MEDIUM, deterministic=True)
    steps, every = (40, 10) if check.small else (400, 50)
    longer = ("--set", f"train.steps={steps}", "--set", f"checkpoint.every_steps={every}")
    straight, killed = check.folder / "straight", check.folder / "killed"
    yield "straight", check.minigpt("pretrain", recipe, "--out", straight, *longer).result
    process = check.start(
        sys.executable, "-m", "minigpt_cli", "pretrain", recipe, "--out", killed, *longer
    )
    seen = killed / f"checkpoints/step-{2 * every:08d}"
    while process.poll() is None and not seen.is_dir() and time.monotonic() < check.deadline:
        time.sleep(0.01)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    yield "killed", {"ok": process.wait() == -signal.SIGKILL and seen.is_dir()}
    caches = {
        name: str(check.folder / name.lower())
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    }
    yield "resumed", check.minigpt("resume", killed, **caches).result
    yield "compared", _difference(straight, killed, steps)


def sampling(check: Check) -> Results:
    """Sampled tokens per second of GPT-2 124M, 1 and 16 texts at a time."""
    cudnn = [] if check.cudnn else ["--no-cudnn"]
    size = ["--small"] if check.small else []
    yield "gpt2", check.python("benchmarks/bench_decode.py", *size, *cudnn).result


def ranks(check: Check) -> Results:
    """With several GPUs: each strategy, twice, with and without NVLS, against one GPU."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus == 1:
        yield "all", {"skipped": "there is one GPU"}
        return
    recipe = _recipe(check, MEDIUM, deterministic=True)
    more = ("--set", "checkpoint.every_steps=40", "--set", "precision.dtype=fp32")
    for optimizer in ("adamw", "muon"):
        settings = (*more, "--set", f"optimizer.name={optimizer}")
        one = check.folder / f"one-{optimizer}"
        yield (
            f"{optimizer}, one GPU",
            check.minigpt("pretrain", recipe, "--out", one, *settings).result,
        )
        for strategy in ("ddp", "fsdp", "hsdp"):
            runs = []
            for number, nvls in enumerate(("0", "0", "1", "1")):
                name = f"{optimizer}, {strategy}, NVLS {nvls}, {number % 2}"
                run = check.folder / name.replace(", ", "-").replace(" ", "")
                half = ("--set", f"distributed.shard_size={gpus // 2}") if gpus % 2 == 0 else ()
                yield name, check.minigpt(
                    "pretrain", recipe, "--out", run, "--nproc", gpus, *settings, "--set",
                    f"distributed.strategy={strategy}", *(half if strategy == "hsdp" else ()),
                    NCCL_NVLS_ENABLE=nvls,
                ).result  # fmt: skip
                runs.append(run)
            yield f"{optimizer}, {strategy}, against one GPU", _distance(one, runs[0])
            # Without NVLS the same bits are promised; with it they may differ.
            yield f"{optimizer}, {strategy}, twice", _difference(runs[0], runs[1], 40)
            with_nvls = _difference(runs[2], runs[3], 40)
            yield f"{optimizer}, {strategy}, twice with NVLS", {"equal": with_nvls["ok"]}


PARTS: dict[str, tuple[Part, int]] = {  # and the most seconds of each
    "machine": (machine, 60),
    "tests": (tests, 180),
    "steps": (steps, 300),
    "pretrain": (pretrain, 150),
    "resume": (resume, 150),
    "sampling": (sampling, 60),
    "ranks": (ranks, 300),
}


def _sizes(check: Check, full: dict[str, int]) -> dict[str, int]:
    return SMALL if check.small else full


def _recipe(check: Check, full: dict[str, int], *, deterministic: bool) -> Path:
    path = check.folder / f"{'deterministic' if deterministic else 'fast'}-{full['hidden']}.toml"
    settings = {**_sizes(check, full), "deterministic": str(deterministic).lower()}
    path.write_text(RECIPE.format(folder=check.folder, **settings))
    return path


def _metrics(run: Path) -> list[dict[str, Any]]:
    file = run / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in _metrics(run) if "loss" in line}


def _difference(one: Path, other: Path, step: int) -> dict[str, Any]:
    """Compare two runs bit by bit: the tensors of the last checkpoint, and the losses."""
    from safetensors import safe_open

    tensors: list[dict[str, bytes]] = []
    for run in (one, other):
        found = {}
        for file in sorted((run / f"checkpoints/step-{step:08d}").glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118
                    tensor = stored.get_tensor(name).contiguous().flatten()
                    found[f"{file.name.split('-')[1]} {name}"] = tensor.numpy().tobytes()
        tensors.append(found)
    first, second = tensors
    different = [name for name in first if first[name] != second.get(name)]
    losses, others = _losses(one), _losses(other)
    return {
        "ok": bool(first) and first.keys() == second.keys() and not different and losses == others,
        "tensors": len(first),
        "different_tensors": different[:10],
        "different_losses": [n for n in losses if losses[n] != others.get(n)][:10],
    }


def _distance(one: Path, other: Path) -> dict[str, Any]:
    """Return the largest relative difference of the losses of two runs."""
    losses, others = _losses(one), _losses(other)
    if not losses or losses.keys() != others.keys():
        return {"ok": False, "losses": [len(losses), len(others)]}
    largest = max(abs(losses[n] - others[n]) / abs(losses[n]) for n in losses)
    return {"ok": largest < 1e-3, "largest_relative_difference": largest}
