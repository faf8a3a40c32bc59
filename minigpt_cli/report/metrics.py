"""metrics.jsonl: an object per logged step and per evaluation; one curve, whatever happens."""

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

FILE = "metrics.jsonl"


class MetricsFile:
    """Appends whole lines, each with one write: a killed process leaves only whole lines behind."""

    def __init__(self, run: Path):
        self._run = run
        self._open()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._descriptor = os.open(self._run / FILE, flags, 0o644)

    def write(self, values: dict[str, Any]) -> None:
        """One line; JSON has no NaN, so a value that is not finite becomes null."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        line = (json.dumps(finite) + "\n").encode()
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
        except OSError:
            written = 0
        if written != len(line):  # a full disk: no torn line for the next one to land on
            os.ftruncate(self._descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def cut_back(self, step: int, evaluated: bool) -> None:
        """``cut_back`` of the run; goes on in the file that is left."""
        cut_back(self._run, step, evaluated)
        self.close()
        self._open()

    def flush(self) -> None:
        """To the disk itself, before a checkpoint says that these steps are done."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def read(run: Path) -> list[dict[str, Any]]:
    """Every whole line; one torn by a power cut is left out."""
    lines = []
    try:
        text = (run / FILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def cut_back(run: Path, step: int, evaluated: bool = True) -> None:
    """Drop what lies beyond ``step``, where the run goes on from.

    Args:
        evaluated: whether the evaluation at that step is in what the run goes on from.
    """
    kept = [
        line
        for line in read(run)
        if line.get("step", 0) < step
        or (line.get("step") == step and (evaluated or "val_loss" not in line))
    ]
    temporary = run / f".{FILE}"
    with temporary.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run / FILE)
