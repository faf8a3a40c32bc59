"""Train nanoGPT on tiny Shakespeare with the settings that its README gives for a CPU."""

import math
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# README.md of nanoGPT, "I only have a macbook".
SETTINGS = (
    "--device=cpu", "--compile=False", "--eval_iters=20", "--log_interval=1", "--block_size=64",
    "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--max_iters=2000",
    "--lr_decay_iters=2000", "--dropout=0.0",
)  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """The result: seconds of training steps, without evaluations, and the validation loss.

    Attributes:
        seconds: of all iterations, those that evaluate counted as their neighbours.
        bits_per_byte: of the last evaluation; a character of this text is a byte.
    """

    seconds: float
    bits_per_byte: float


def train_nanogpt(folder: Path, text: Path, python: Path, *more: str) -> Trained:
    """Train in a copy of nanoGPT's directory.

    Args:
        folder: a checkout of nanoGPT; stays as it is.
        text: tiny Shakespeare, which nanoGPT would download.
        python: the interpreter of the peers' environment.
        *more: settings after those of its README.
    """
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / "nanogpt"
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(".git"))
        data = copy / "data" / "shakespeare_char"
        shutil.copyfile(text, data / "input.txt")
        subprocess.run([python, data / "prepare.py"], check=True, capture_output=True)
        command = [python, "train.py", "config/train_shakespeare_char.py", *SETTINGS, *more]
        done = subprocess.run(command, cwd=copy, check=True, capture_output=True, text=True)
    return read_log(done.stdout)


def read_log(log: str) -> Trained:
    """Read what nanoGPT's train.py prints with ``log_interval=1``."""
    times = {int(n): float(ms) for n, ms in re.findall(r"iter (\d+): loss .* time ([\d.]+)ms", log)}
    losses = {
        int(n): float(loss) for n, loss in re.findall(r"step (\d+): .*val loss ([\d.]+)", log)
    }
    # An iteration's time includes its evaluation. The first one also warms up.
    plain = [ms for iteration, ms in times.items() if iteration not in losses]
    mean = sum(plain) / len(plain)
    seconds = (sum(plain) + mean * (len(times) - len(plain))) / 1000
    return Trained(seconds, losses[max(losses)] / math.log(2))
