"""How fast threads train that spin while they wait, on a quiet machine and beside busy loops.

    python benchmarks/bench_spin.py DATASET [ROUNDS]

DATASET is the dataset of recipes/tiny.toml, such as data/tiny.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes/tiny.toml"
SETTINGS = {
    "libgomp's own": {"GOMP_SPINCOUNT": "300000"},
    "GOMP_SPINCOUNT=20000": {"GOMP_SPINCOUNT": "20000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
STEPS = 60


def tokens_per_second(dataset: str, variables: dict[str, str]) -> float:
    """Return the median over the steps of a short run, without its first ten."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        values = (f"train.steps={STEPS}", "log.every_steps=1", "eval.every_steps=1000",
                  f"data.path={dataset}", "schedule.warmup_steps=1")  # fmt: skip
        sets = [word for value in values for word in ("--set", value)]
        subprocess.run(
            [sys.executable, "-m", "minigpt_cli", "pretrain", RECIPE, "-o", run, *sets],
            env=os.environ | variables, check=True, capture_output=True,
        )  # fmt: skip
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return statistics.median(rates[10:])


def main(dataset: str, rounds: int = 3) -> None:
    for loops in (0, os.cpu_count() or 1):
        busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
        try:
            found: dict[str, list[float]] = {name: [] for name in SETTINGS}
            for _ in range(rounds):
                for name, variables in SETTINGS.items():
                    found[name].append(tokens_per_second(dataset, variables))
        finally:
            for process in busy:
                process.kill()
        for name, rates in found.items():
            each = " ".join(f"{rate:,.0f}" for rate in rates)
            print(f"{loops} busy loops, {name}: {statistics.median(rates):,.0f} tok/s ({each})")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:3]))
