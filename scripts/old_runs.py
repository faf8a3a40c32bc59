"""Check that this checkout uses what commit 93d8a84 made, with the same results bit for bit.

    python scripts/old_runs.py compare        # make old-runs
    python scripts/old_runs.py make FOLDER    # the samples in tests/data/old

``compare`` makes small samples with the old code, in a temporary git worktree, and copies them
twice. The old code uses one copy, this checkout the other. Both run on this machine, on its CPU,
with one thread: the same bits are only promised there.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parent.parent
OLD = "93d8a84"

SAMPLES = ROOT / "tests/data/old"  # also holds the recipes and the texts

FINISHED = (
    "tokenize text.txt --out data/text --train-vocab 300 --val-fraction 0.2 --workers 1",
    "pretrain base.toml",
    "finetune-lora chat.toml",
)
STOPPED = {
    "adamw": (signal.SIGTERM, "pretrain adamw.toml"),
    "muon": (signal.SIGKILL, "pretrain muon.toml"),
    "lora": (signal.SIGTERM, "finetune-lora lora.toml"),
}
STEPS_BEFORE_SIGNAL = 7  # of 30
USES = {
    "tokenize again": FINISHED[0],
    "verify": "verify runs/adamw",
    "eval adamw": "eval runs/adamw",
    "eval muon": "eval runs/muon",
    "eval base": "eval runs/base --text text.txt",
    "eval final": "eval runs/base/final --data data/text",
    "eval lora": "eval runs/base --adapter runs/lora --data data/text",
    "eval peft": "eval runs/base --adapter runs/chat/final --data data/text",
    "eval instructions": "eval runs/base --adapter runs/chat --data data/chat",
    "sample": "sample runs/base --prompt The --temperature 0 --max-new-tokens 8 --dtype fp32",
    "export muon": "export runs/muon exported/muon",
    "export lora": "export runs/base exported/lora --adapter runs/lora",
    "export peft": "export runs/base exported/peft --adapter runs/chat --adapter-only",
    "resume adamw": "resume runs/adamw",
    "resume muon": "resume runs/muon",
    # The recipe of an adapter holds the absolute path of its base.
    "resume lora": "resume runs/lora --set lora.base=runs/base",
}
TIMED = {"tokens_per_second", "mfu", "seconds", "time", "memory_bytes"}
ADDED = TIMED | {"prompt_tokens_seen", "requested_vocab_size", "val_share"}  # new in today's


def start(code: Path, folder: Path, line: str) -> subprocess.Popen[str]:
    """Start ``minigpt LINE`` of the checkout ``code`` in ``folder``, on the CPU with one thread."""
    variables = {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-m", "minigpt_cli", *line.split()], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | variables,
    )  # fmt: skip


def make_samples(code: Path, folder: Path) -> None:
    """Make two datasets, three runs and two adapters in ``folder`` with the checkout ``code``.

    ``base`` and ``chat`` are complete. ``adamw``, ``muon`` and ``lora`` are stopped on their way.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in (*SAMPLES.glob("*.toml"), SAMPLES / "text.txt", SAMPLES / "chat.jsonl"):
        shutil.copy(file, folder)
    for line in FINISHED:
        process = start(code, folder, line)
        _, stderr = process.communicate()
        if process.returncode != 0:
            sys.exit(f"minigpt {line}: exit code {process.returncode}\n{stderr}")
    for name, (signum, line) in STOPPED.items():
        while not stop(code, folder, name, signum, line):
            shutil.rmtree(folder / "runs" / name)


def stop(code: Path, folder: Path, name: str, signum: int, line: str) -> bool:
    """Start a run and send it a signal after some steps; return False if it ended too early."""
    process = start(code, folder, line)
    metrics = folder / "runs" / name / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= STEPS_BEFORE_SIGNAL:
            process.send_signal(signum)
            break
        time.sleep(0.001)
    _, stderr = process.communicate()
    if process.returncode not in (0, 75 if signum == signal.SIGTERM else -signum):
        sys.exit(f"minigpt {line}: exit code {process.returncode}\n{stderr}")
    return process.returncode != 0


def use_samples(code: Path, folder: Path) -> dict[str, Any]:
    """Evaluate, export and resume the samples in ``folder`` with the checkout ``code``.

    Returns:
        The JSON output of each command (its exit code and last line if it failed), the lines of
        each metrics.jsonl, and the tensors of each exported directory and of each last checkpoint.
    """
    folder = folder.resolve()  # as in the paths that minigpt prints
    results: dict[str, Any] = {}
    for name, line in USES.items():
        process = start(code, folder, f"{line} --json")
        stdout, stderr = (text.replace(f"{folder}/", "") for text in process.communicate())
        if process.returncode == 0:
            results[name] = json.loads(stdout)
        else:
            last = (stderr.strip().splitlines() or [""])[-1]
            results[name] = f"exit code {process.returncode}: {last}"
    for directory in sorted(folder.glob("exported/*")):
        results[f"weights {directory.name}"] = tensors(directory)
    for name in STOPPED:
        directory = folder / "runs" / name
        lines = (directory / "metrics.jsonl").read_text().splitlines()
        results[f"metrics {name}"] = [json.loads(line) for line in lines]
        results[f"state {name}"] = tensors(max((directory / "checkpoints").glob("step-*")))
        results[f"final {name}"] = tensors(directory / "final")
    return results


def tensors(directory: Path) -> dict[str, Any]:
    """Return every tensor in the safetensors files of ``directory``."""
    files = sorted(directory.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def difference(old: Any, new: Any, key: str = "") -> str:
    """Return the first difference between two results, or an empty text."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old, 1)), dict(enumerate(new, 1))
    if isinstance(old, dict) and isinstance(new, dict):
        if other := sorted(map(str, (old.keys() ^ new.keys()) - ADDED)):
            return f"{key}: only one of them has {', '.join(other[:4])}"
        found = (difference(old[k], new[k], f"{key} {k}") for k in old if k not in TIMED)
        return next(filter(None, found), "")
    if isinstance(old, np.ndarray) and isinstance(new, np.ndarray):
        same = (old.dtype, old.shape, old.tobytes()) == (new.dtype, new.shape, new.tobytes())
        return "" if same else f"{key}: other bits"
    # The learning rate is a float64 that may be computed in another order.
    same = old == new or (key.endswith(" lr") and abs(old - new) <= 1e-12 * abs(old))
    return "" if same else f"{key}: {old} -> {new}"


@contextmanager
def old_code(folder: Path) -> Iterator[Path]:
    """Check out the old commit in ``folder`` for as long as the block lasts."""
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "cat-file", "-e", f"{OLD}^{{commit}}"], capture_output=True)
    if found.returncode != 0:
        sys.exit(f"commit {OLD} is not in this clone: run git fetch --unshallow, then try again")
    try:
        subprocess.run([*git, "worktree", "add", "-q", "--detach", str(folder), OLD], check=True)
        yield folder
    finally:
        subprocess.run([*git, "worktree", "remove", "--force", str(folder)], capture_output=True)


def make(folder: Path) -> None:
    """Make samples with the old code and, in ``expected/``, what the old code makes of them."""
    with tempfile.TemporaryDirectory() as temporary, old_code(Path(temporary, "code")) as code:
        make_samples(code, folder)
        copy = shutil.copytree(folder, Path(temporary, "copy"))
        results = use_samples(code, copy)
        expected = folder / "expected"
        expected.mkdir()
        evaluations = {line: results[name] for name, line in USES.items() if "eval" in name}
        (expected / "evaluations.json").write_text(json.dumps(evaluations, indent=2) + "\n")
        for name in STOPPED:
            shutil.copy(copy / "runs" / name / "metrics.jsonl", expected / f"{name}.jsonl")
            (weights,) = (copy / "runs" / name / "final").glob("*.safetensors")
            shutil.copy(weights, expected / f"{name}.safetensors")


def compare() -> int:
    """Print a table of the results of the old code and of this checkout.

    Returns:
        How many of them differ.
    """
    results = []
    with tempfile.TemporaryDirectory() as temporary, old_code(Path(temporary, "code")) as code:
        print(f"making samples with {OLD} ...", flush=True)
        make_samples(code, Path(temporary, "samples"))
        for name, checkout in {"old": code, "new": ROOT}.items():
            print(f"using them with the {name} code ...", flush=True)
            copy = shutil.copytree(Path(temporary, "samples"), Path(temporary, name))
            results.append(use_samples(checkout, copy))
    old, new = results
    different = 0
    for name in old:
        worked = old[name] and not isinstance(old[name], str)
        found = difference(old[name], new.get(name)) if worked else f"no result: {old[name]}"
        print(f"{name:18} {found or 'the same'}")
        different += bool(found)
    print(f"{different} of {len(old)} results differ")
    return different


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree is removed
    match sys.argv[1:]:
        case ["make", folder]:
            make(Path(folder).resolve())
        case ["compare"]:
            sys.exit(compare() > 0)
        case _:
            sys.exit(__doc__)
