"""See gpu_check.sh."""

import argparse
import datetime
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


def run(*command: str, cwd: Path = ROOT) -> tuple[int, str, float]:
    """(exit code, output, seconds) of a command whose output is shown as it comes."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines = []
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines), time.perf_counter() - began


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results")
    out: Path = parser.parse_args().out
    if not torch.cuda.is_available():
        print("gpu_check: torch finds no CUDA GPU here", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    results: dict[str, object] = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout.strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    minigpt = (sys.executable, "-m", "minigpt_cli")

    code, output, seconds = run(sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-v")
    results["tests"] = {"exit_code": code, "seconds": seconds, "summary": output.splitlines()[-1]}
    failed = code != 0

    with tempfile.TemporaryDirectory() as folder:
        place = ("--set", f"data.path={folder}/data", "--out", f"{folder}/run")
        code, output, seconds = run(*minigpt, "pretrain", "recipes/tiny.toml", *place)
        found = re.findall(r"bits per byte ([\d.]+)", output)
        trained = re.findall(r"([\d.]+) s of training", output)
        results["tiny"] = {
            "exit_code": code,
            "seconds": seconds,
            "training_seconds": float(trained[-1]) if trained else None,
            "val_bits_per_byte": float(found[-1]) if found else None,
        }
        failed |= code != 0
        if not code:
            run(*minigpt, "sample", f"{folder}/run", "--prompt", "def ", "--max-new-tokens", "80")

    for name, arguments in {
        "gpt2_124m": (),
        "gpt2_124m_compiled": ("--compile",),
        "gpt2_124m_not_deterministic": ("--no-deterministic",),
        "gpt2_124m_compiled_not_deterministic": ("--compile", "--no-deterministic"),
    }.items():
        command = (sys.executable, "benchmarks/bench_train.py", "--batch", "32", *arguments)
        code, output, _ = run(*command)
        results[name] = json.loads(output.splitlines()[-1]) if not code else {"exit_code": code}
        failed |= code != 0

    out.mkdir(parents=True, exist_ok=True)
    path = out / f"gpu-{re.sub(r'[^A-Za-z0-9]+', '-', device).strip('-').lower()}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"gpu_check: {'FAILED; ' if failed else ''}results in {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
