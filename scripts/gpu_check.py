"""See gpu_check.sh."""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_commands import ROOT, Check, Part
from gpu_parts import PARTS

FORMAT = "minigpt-gpu-check-1"
LEAST_SECONDS = 10  # a part doesn't start with less


def is_failure(result: dict[str, Any]) -> bool:
    """Return whether a command failed, or something compared is not as it must be."""
    return result.get("exit_code", 0) != 0 or result.get("ok") is False


def run_part(name: str, part: Part, check: Check, write: Callable[[], None]) -> bool:
    """Run one part, note and write each of its results as it comes; return whether it failed."""
    found = check.results[name] = {}
    began, failed = time.monotonic(), False
    try:
        for what, result in part(check):
            found[what] = result
            failed |= is_failure(result)
            write()
            if time.monotonic() > check.deadline:
                found["stopped"], failed = "its time was up", True
                break
    except Exception as error:  # the other parts still have something to tell
        found["error"], failed = f"{type(error).__name__}: {error}", True
    found["part_seconds"] = round(time.monotonic() - began, 1)
    write()
    print(
        f"gpu_check: {name} {'FAILED' if failed else 'ok'}, {found['part_seconds']} s", flush=True
    )
    return failed


def write_json(path: Path, results: dict[str, Any]) -> None:
    """Replace the file at once, so that a kill leaves a whole one."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    new.replace(path)


def new_file(folder: Path, name: str) -> Path:
    """Return the JSON file for the results. Those of an earlier check, and its log, stay."""
    path, number = folder / f"{name}.json", 1
    while path.exists() or path.with_suffix(".log").exists():
        number += 1
        path = folder / f"{name}-{number}.json"
    return path


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_check.sh", description="Check and measure minigpt on this machine's CUDA GPUs."
    )
    parser.add_argument("--only", action="append", choices=PARTS, metavar="PART", default=[],
                        help="run this part only; may be repeated")  # fmt: skip
    parser.add_argument("--list", action="store_true", help="print the parts, and run none")
    parser.add_argument("--minutes", type=float, default=10, help="limit of the whole (10)")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results",
                        help="directory of the results")  # fmt: skip
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the script")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    if args.list:
        for name, (part, seconds) in PARTS.items():
            print(f"{name:9} {(part.__doc__ or '').splitlines()[0]} At most {seconds} s.")
        return 0
    import torch

    if not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA GPU here", file=sys.stderr)
        return 2
    end = time.monotonic() + 60 * args.minutes
    device = torch.cuda.get_device_name()
    name = f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-').lower()}"
    args.out.mkdir(parents=True, exist_ok=True)
    path = new_file(args.out, name)
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    results: dict[str, Any] = {
        "format": FORMAT,
        "device": device,
        "devices": torch.cuda.device_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip(),
        "small": args.small,
        "parts": {},
    }
    failed = []
    with (
        tempfile.TemporaryDirectory() as folder,
        open(path.with_suffix(".log"), "wb") as errors,
    ):
        for part_name, (part, seconds) in PARTS.items():
            if args.only and part_name not in args.only:
                continue
            left = end - time.monotonic()
            if left < LEAST_SECONDS:
                results["parts"][part_name] = {"skipped": "no time was left"}
                write_json(path, results)
                continue
            check = Check(
                folder=Path(folder), errors=errors, small=args.small,
                cudnn=os.environ.get("GPU_CHECK_CUDNN") != "0",
                deadline=time.monotonic() + min(seconds, left), results=results["parts"],
            )  # fmt: skip
            if run_part(part_name, part, check, lambda: write_json(path, results)):
                failed.append(part_name)
    outcome = f"FAILED: {', '.join(failed)}; " if failed else ""
    print(f"gpu_check: {outcome}results in {path}, standard error in {path.with_suffix('.log')}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
