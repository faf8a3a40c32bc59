"""How long `minigpt --help` takes, against `import typer, rich`; prints one JSON line."""

import json
import statistics
import subprocess
import sys
import time


def seconds(*command: str) -> float:
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    floor = (sys.executable, "-c", "import typer, rich")
    ours = (sys.executable, "-m", "minigpt_cli", "--help")
    for command in (floor, ours):
        seconds(*command)  # byte code and the disk's cache
    pairs = [(seconds(*floor), seconds(*ours)) for _ in range(20)]
    print(
        json.dumps(
            {
                "import_typer_rich_seconds": statistics.median(a for a, _ in pairs),
                "help_seconds": statistics.median(b for _, b in pairs),
                "ratio": statistics.median(b / a for a, b in pairs),
            }
        )
    )


if __name__ == "__main__":
    main()
