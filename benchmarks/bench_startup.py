"""Measure `minigpt --help` against `python -c "import typer, rich"`; print one JSON line.

The two alternate, ten times each. The ratio of the medians must be at most 3.
"""

import json
import statistics
import subprocess
import sys
import time

PAIRS = 10


def seconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    floor = (sys.executable, "-c", "import typer, rich")
    ours = (sys.executable, "-m", "minigpt_cli", "--help")
    for command in (floor, ours):
        seconds(*command)  # byte code and the disk's cache
    pairs = [(seconds(*floor), seconds(*ours)) for _ in range(PAIRS)]
    floors, helps = (list(each) for each in zip(*pairs, strict=True))
    low, high = statistics.median(floors), statistics.median(helps)
    medians = {"import_typer_rich_seconds": low, "help_seconds": high, "ratio": high / low}
    print(json.dumps({**medians, "import_samples": floors, "help_samples": helps}))


if __name__ == "__main__":
    main()
