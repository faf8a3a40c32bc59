"""metrics.jsonl (logged steps, evaluations) and samples.jsonl (completions), of one curve."""

import contextlib
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
from minigpt_cli.core.reading import parse_json, read_bytes, read_end
from minigpt_cli.core.run_dir import METRICS

_MAX_BYTES = 1 << 30
_END_BYTES = 1 << 18  # about 1,000 lines


class MetricsFile:
    """Appends whole lines, each with one write, so that a killed process leaves no torn line.

    A full disk is only a warning: the run itself can go on.
    """

    def __init__(self, run: Path, name: str = METRICS):
        """Open the file of a run directory, METRICS or SAMPLES, or create it."""
        self._run, self._name = run, name
        self._descriptor = self._open()

    def write(self, values: dict[str, Any]) -> dict[str, Any]:
        """Append one line with the time (s since 1970), and return it.

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
        return finite

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
        kept, _ = cut_back(self._run, step, evaluated, self._name)
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


def read_last(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the last line with a loss and the last evaluation of metrics.jsonl.

    Only the end of the file is read, so that its size doesn't matter.

    Returns:
        (step, evaluation); an empty dictionary for what isn't there.

    Raises:
        Damaged: the file can't be read, or holds no whole line of metrics.
    """
    file = run / METRICS
    if not os.path.lexists(file):
        return {}, {}
    found: dict[str, dict[str, Any]] = {}
    content = read_end(file, _END_BYTES, Damaged)
    for line in reversed(content.splitlines()):
        for key in ("loss", "val_loss"):
            if key not in found and f'"{key}"'.encode() in line:
                with contextlib.suppress(UserError):  # torn by a power cut, or being written
                    value = parse_json(line, str(file))
                    if type(value.get("step")) is int and key in value:
                        found[key] = value
        if len(found) == 2:
            break
    if content and not found and len(content.splitlines()) > 1:
        raise Damaged(f"{file}: holds no metrics")
    return found.get("loss", {}), found.get("val_loss", {})


def split_lines(
    run: Path, step: int, evaluated: bool = True, name: str = METRICS
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the lines of the curve that ends at ``step``, and the lines beyond it.

    Args:
        run: the run directory.
        step: the last step of the curve.
        evaluated: whether the evaluation at that step belongs to it.
        name: METRICS or SAMPLES.

    Raises:
        Damaged: the file can't be read.
    """

    def is_kept(line: dict[str, Any]) -> bool:
        is_evaluation = not {"val_loss", "completion"}.isdisjoint(line)
        at_step = line["step"] == step and (evaluated or not is_evaluation)
        return line["step"] < step or at_step

    kept: list[dict[str, Any]] = []
    beyond: list[dict[str, Any]] = []
    for line in read(run, name):
        (kept if is_kept(line) else beyond).append(line)
    return kept, beyond


def cut_back(
    run: Path, step: int, evaluated: bool = True, name: str = METRICS
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Drop the lines after ``step``, from which the run goes on; see ``split_lines``.

    Raises:
        Damaged: the file can't be read.
        OSError: the file can't be written.
    """
    kept, dropped = split_lines(run, step, evaluated, name)
    text = "".join(json.dumps(line) + "\n" for line in kept)
    write_atomically(run / name, text.encode())
    return kept, dropped
