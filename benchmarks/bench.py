"""Measure minigpt beside its peers on this machine; every raw sample goes to a JSON file.

    make bench NANOGPT=~/nanoGPT        # a checkout of nanoGPT; without it, its rows are missing
    python -m benchmarks.bench --only train --rounds 1      # to bench-part.json

Each figure is of processes of its own, and those that are compared alternate. A busy machine is
refused, unless --busy is given; then the results say so. benchmarks/table.py shows the results.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.nanogpt_shakespeare import train_nanogpt
from benchmarks.results import FOLDER, ROOT, Row, machine_is_busy, write_results
from benchmarks.shapes import BATCH, TOKENS, VOCAB, shape

DATA = ROOT / "build" / "bench"  # datasets, kept for the next time
TINY_STEPS = 60


def command(*words: object, python: Path | str = sys.executable) -> str:
    """Run a Python program from the repository; return its standard output."""
    done = subprocess.run(
        [python, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} failed:\n{done.stderr}")
    return done.stdout


def json_of(*words: object, python: Path | str = sys.executable) -> dict[str, Any]:
    """Run a program whose last line of output is a JSON object; return this object."""
    found: dict[str, Any] = json.loads(command(*words, python=python).splitlines()[-1])
    return found


def alternate(
    rounds: int, work: str, unit: str, measures: dict[tuple[str, str], Callable[[], list[float]]]
) -> list[Row]:
    """Measure each thing once in each round.

    Args:
        measures: (program, setting) -> a function that returns the samples of one process.
    """
    samples: dict[tuple[str, str], list[list[float]]] = {key: [] for key in measures}
    for _ in range(rounds):
        for key, measure in measures.items():
            samples[key].append(measure())
            print(f"{work}: {' '.join(key)}: {samples[key][-1][:6]} {unit}", file=sys.stderr)
    return [Row(work, who, how, unit, found) for (who, how), found in samples.items()]


def train(a: argparse.Namespace) -> list[Row]:
    """Measure training steps of the shapes in shapes.py, after a check that the models agree."""
    nanogpt = ("--nanogpt", a.nanogpt) if a.nanogpt else ()
    agree = json_of("-m", "benchmarks.peers", *nanogpt, "check", python=a.peer_python)
    rows = [
        Row("equal losses", who, "", "relative difference", [[each]]) for who, each in agree.items()
    ]

    def ours(family: str, *options: str) -> Callable[[], list[float]]:
        c = shape(family)  # type: ignore[arg-type]
        sizes = {"family": family, "vocab": VOCAB, "hidden": c.hidden_size, "batch": BATCH,
                 "layers": c.num_hidden_layers, "heads": c.num_attention_heads,
                 "sequence-length": TOKENS, "steps": a.steps}  # fmt: skip
        words = [word for name, value in sizes.items() for word in (f"--{name}", value)]
        script = ROOT / "benchmarks" / "bench_train.py"
        return lambda: _ms(json_of(script, *words, *options))

    def peer(name: str, *options: object) -> Callable[[], list[float]]:
        words = ("-m", "benchmarks.peers", *nanogpt, "time", name, "--steps", a.steps, *options)
        return lambda: _ms(json_of(*words, python=a.peer_python))

    gpt2 = {("minigpt", "eager"): ours("gpt2"), ("minigpt", "compiled"): ours("gpt2", "--compile")}
    if a.nanogpt:
        gpt2 |= {
            ("nanoGPT", "fp32, its default on a CPU"): peer("nanoGPT"),
            ("nanoGPT", "bf16"): peer("nanoGPT", "--dtype", "bf16"),
            ("nanoGPT", "bf16, compiled"): peer("nanoGPT", "--dtype", "bf16", "--compile"),
        }
    gpt2[("HF", "bf16")] = peer("HF", "--dtype", "bf16")
    llama = {
        ("minigpt", "eager"): ours("llama"),
        ("minigpt", "compiled"): ours("llama", "--compile"),
        ("litgpt", "bf16-true"): peer("litgpt", "--dtype", "bf16-true"),
        ("litgpt", "bf16-true, compiled"): peer("litgpt", "--dtype", "bf16-true", "--compile"),
    }
    return (
        rows + alternate(a.rounds, "gpt2", "ms", gpt2) + alternate(a.rounds, "llama", "ms", llama)
    )


def _ms(result: dict[str, Any]) -> list[float]:
    return [round(1000 * seconds, 2) for seconds in result["step_seconds"]]


def limits(a: argparse.Namespace) -> list[Row]:
    """Measure the machine's rates of matrix products and of reading memory."""
    found = [json_of("-m", "benchmarks.machine_limits") for _ in range(a.rounds)]
    rows = [
        Row("products", "limit", product, "GFLOP/s", [each["products"][product] for each in found])
        for product in found[0]["products"]
    ]
    return [*rows, Row("reads", "limit", "512 MiB", "GB/s", [each["reads"] for each in found])]


def sample(a: argparse.Namespace) -> list[Row]:
    """Measure sampling of GPT-2 124M beside transformers; bench_sample.py alternates by itself."""
    script = ROOT / "benchmarks" / "bench_sample.py"
    found = json_of(script, "--peer-python", a.peer_python, "--rounds", a.rounds)
    return [
        Row(f"sample, batch {row['batch']}", who, row["dtype"], "tokens/s", [samples])
        for row in found["rows"]
        for name, samples in row["tokens_per_second"].items()
        for who in [{"transformers": "HF"}.get(name, name)]
    ]


def pretrain(recipe: str, name: str, *values: str) -> list[dict[str, Any]]:
    """Train a recipe in a process of its own; return the lines of its metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        sets = [f"--set={each}" for each in (f"data.path={DATA / name}", *values)]
        command("-m", "minigpt_cli", "pretrain", f"recipes/{recipe}.toml", "-o", run, *sets)
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def last(lines: Iterable[dict[str, Any]], name: str) -> float:
    """Return the last value of a metric."""
    return float([line[name] for line in lines if name in line][-1])


def tiny(a: argparse.Namespace) -> list[Row]:
    """Measure the rate of the first steps of recipes/tiny.toml."""

    def rates() -> list[float]:
        few = (f"train.steps={TINY_STEPS}", "log.every_steps=1", "schedule.warmup_steps=1")
        lines = pretrain("tiny", "tiny", *few, "eval.windows=8", "eval.prompts=[]")
        return [round(line["tokens_per_second"]) for line in lines if "loss" in line][10:]

    return alternate(a.rounds, "tiny", "tokens/s", {("minigpt", "eager"): rates})


def shakespeare(a: argparse.Namespace) -> list[Row]:
    """Train recipes/shakespeare-speed.toml with a seed for each round, and nanoGPT's own once."""
    if a.shakespeare is None:
        print("shakespeare: no --shakespeare FILE, not measured", file=sys.stderr)
        return []
    seconds, bits = [], []
    for seed in range(a.rounds):
        text = (f"data.source.path={a.shakespeare}", f"train.seed={seed}")
        lines = pretrain("shakespeare-speed", "shakespeare-speed", *text)
        seconds.append([last(lines, "seconds")])
        bits.append([last(lines, "val_bits_per_byte")])
    how = "recipes/shakespeare-speed.toml"
    rows = [
        Row("shakespeare", "minigpt", how, "s of training", seconds),
        Row("shakespeare", "minigpt", how, "bits per byte", bits),
    ]
    if a.nanogpt:
        found = train_nanogpt(a.nanogpt, a.shakespeare, a.peer_python)
        how = "its README's settings for a CPU"
        rows += [
            Row("shakespeare", "nanoGPT", how, "s of training", [[found.seconds]]),
            Row("shakespeare", "nanoGPT", how, "bits per byte", [[found.bits_per_byte]]),
        ]
    return rows


def tokenize(a: argparse.Namespace) -> list[Row]:
    """Measure tokenization beside the bare tokenizer."""
    DATA.mkdir(parents=True, exist_ok=True)
    script = ROOT / "benchmarks" / "bench_tokenize.py"
    found = json_of(script, "--megabytes", a.megabytes, "--folder", DATA)
    return [
        Row("tokenize", "minigpt", "the whole command", "MB/s", [[found["mb_per_second"]]]),
        Row("tokenize", "limit", "encode_batch_fast", "MB/s", [[found["bare_mb_per_second"]]]),
    ]


def startup(a: argparse.Namespace) -> list[Row]:
    """Measure `minigpt --help` beside the import of what it needs."""
    found = json_of(ROOT / "benchmarks" / "bench_startup.py")
    ours, floor = found["help_samples"], found["import_samples"]
    return [
        Row("startup", "minigpt", "--help", "ms", [[round(1000 * each, 1) for each in ours]]),
        Row("startup", "limit", "import typer, rich", "ms",
            [[round(1000 * each, 1) for each in floor]]),
    ]  # fmt: skip


def save(a: argparse.Namespace) -> list[Row]:
    """Measure how long a save of 100 M parameters holds training up."""
    found = json_of(ROOT / "benchmarks" / "bench_save.py")
    return [
        Row("save", "minigpt", kind, "s", [found[kind]["blocked_samples"]])
        for kind in ("asynchronous", "synchronous")
    ]


def seeds(a: argparse.Namespace) -> list[Row]:
    """Train recipes/tiny.toml to its end with three seeds."""
    bits, seconds = [], []
    for seed in range(3):
        lines = pretrain("tiny", "tiny", f"train.seed={seed}")
        bits.append([last(lines, "val_bits_per_byte")])
        seconds.append([last(lines, "seconds")])
    how = "recipes/tiny.toml, three seeds"
    return [
        Row("tiny to its end", "minigpt", how, "bits per byte", bits),
        Row("tiny to its end", "minigpt", how, "s of training", seconds),
    ]


def growth(a: argparse.Namespace) -> list[Row]:
    """Measure the cost of a step against sizes; growth.py prints a JSON object for each."""
    found = [json.loads(line) for line in command("-m", "benchmarks.growth").splitlines()]
    return [
        Row(f"growth: {each['what']}", "minigpt", str(each["x"]), "s", [each["samples"]])
        for each in found
    ]


PARTS = (limits, train, sample, tiny, shakespeare, tokenize, startup, save)
FULL = (seeds, growth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = {part.__name__: part for part in (*PARTS, *FULL)}
    parser.add_argument("--only", nargs="+", choices=known, metavar="PART",
                        help=f"some of {', '.join(known)}")  # fmt: skip
    parser.add_argument("--full", action="store_true", help="all parts")
    parser.add_argument("--name", help="of the file in benchmarks/results; default: bench, with "
                        "--only bench-part")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed training steps of a process")
    parser.add_argument("--megabytes", type=int, default=100, help="of text to tokenize")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT")
    parser.add_argument("--shakespeare", type=Path, metavar="FILE", help="tiny Shakespeare's text")
    parser.add_argument("--peer-python", type=Path, default=ROOT / ".venv-peers" / "bin" / "python")
    parser.add_argument("--busy", action="store_true", help="measure beside other work")
    a = parser.parse_args()
    for given in (a.nanogpt, a.shakespeare):
        if given is not None and not given.exists():
            sys.exit(f"bench: {given} doesn't exist")
    a.peer_python = a.peer_python.absolute()  # not resolved: its environment is beside the link
    if not a.peer_python.exists():
        sys.exit(f"bench: {a.peer_python} doesn't exist: make .venv-peers/installed makes it")
    busy = machine_is_busy()
    if busy and not a.busy:
        sys.exit(
            f"bench: the machine is busy (load {os.getloadavg()[0]:.1f}): wait until it is quiet, "
            "or give --busy, which marks the results"
        )
    a.nanogpt, a.shakespeare = (path and path.resolve() for path in (a.nanogpt, a.shakespeare))
    wanted = a.only or [part.__name__ for part in (*PARTS, *(FULL if a.full else ()))]
    # The README is made of bench.json: some parts must not replace all of them.
    whole = a.name or ("bench-part" if a.only else "bench")
    for name, parts in ((whole, PARTS), (f"{whole}-full", FULL)):
        rows: list[Row] = []
        for part in parts:
            if part.__name__ in wanted:
                rows += part(a)
                # After each part, so that a killed run leaves what it had.
                write_results(FOLDER / f"{name}.json", rows, busy=busy, peer_python=a.peer_python)


if __name__ == "__main__":
    main()
