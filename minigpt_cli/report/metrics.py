"""metrics.jsonl (logged steps, evaluations) and samples.jsonl (completions), of one curve."""

import errno
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from minigpt_cli.core.console import warn
from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.core.files import write_atomically
from minigpt_cli.core.reading import parse_json, read_bytes
from minigpt_cli.core.run_dir import METRICS

_MAX_BYTES = 1 << 30


class MetricsFile:
    """Appends whole lines, each with one write, so that a killed process leaves no torn line.

    A full disk is only a warning: the run itself can go on.
    """

    def __init__(self, run: Path, name: str = METRICS):
        """Open the file of a run directory, METRICS or SAMPLES, or create it."""
        self._run, self._name = run, name
        self._descriptor = self._open()

    def write(self, values: dict[str, Any]) -> None:
        """Append one line with the time (s since 1970).

        JSON has no NaN, so a number that is not finite becomes null.
        """
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in (values | {"time": round(time.time(), 3)}).items()
        }
        try:
            self._append((json.dumps(finite) + "\n").encode())
        except OSError as error:
            self._warn(error)

    def flush(self) -> None:
        """Write to the disk itself, before a checkpoint says that these steps are done."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            self._warn(error)

    def cut_back(self, step: int, evaluated: bool) -> list[dict[str, Any]]:
        """Call the function ``cut_back``, and go on in the new file; return the lines in it.

        Raises:
            OSError: it can't be written.
        """
        kept = cut_back(self._run, step, evaluated, self._name)
        self.close()
        self._descriptor = self._open()
        return kept

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW  # a link may lead elsewhere
        return os.open(self._run / self._name, flags, 0o644)

    def _append(self, line: bytes) -> None:
        size = os.fstat(self._descriptor).st_size
        try:
            written = os.write(self._descriptor, line)
        except OSError:
            written = 0
        if written != len(line):  # a full disk: remove the torn line
            os.ftruncate(self._descriptor, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _warn(self, error: OSError) -> None:
        warn(f"{self._name} could not be written: {error.strerror}")


def read(run: Path, name: str = METRICS) -> list[dict[str, Any]]:
    """Return every whole line of METRICS or SAMPLES that has a step; none if there is no file.

    Raises:
        Damaged: it can't be read.
    """
    file, lines = run / name, []
    if not os.path.lexists(file):
        return []
    for line in read_bytes(file, Damaged, _MAX_BYTES).splitlines():
        try:
            value = parse_json(line, str(file))
        except UserError:  # torn by a power cut
            continue
        if type(value.get("step")) is int:
            lines.append(value)
    return lines


def cut_back(
    run: Path, step: int, evaluated: bool = True, name: str = METRICS
) -> list[dict[str, Any]]:
    """Drop the lines after ``step``, from which the run goes on; return the others.

    Args:
        run: the run directory.
        step: the last step to keep.
        evaluated: whether to keep the evaluation at that step.
        name: METRICS or SAMPLES.

    Raises:
        Damaged: the file can't be read.
        OSError: the file can't be written.
    """

    def is_kept(line: dict[str, Any]) -> bool:
        is_evaluation = not {"val_loss", "completion"}.isdisjoint(line)
        at_step = line["step"] == step and (evaluated or not is_evaluation)
        return line["step"] < step or at_step

    kept = [line for line in read(run, name) if is_kept(line)]
    text = "".join(json.dumps(line) + "\n" for line in kept)
    write_atomically(run / name, text.encode())
    return kept
