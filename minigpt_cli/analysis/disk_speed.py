"""How fast a directory's disk writes and reads."""

import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from minigpt_cli.analysis.finding import Finding
from minigpt_cli.core.files import os_reason
from minigpt_cli.core.memory import format_size

_SECONDS = 1.0  # of writing
_MOST = 256 << 20  # bytes
_PIECE = 8 << 20  # bytes
_CHECKPOINT = 12 * 124_439_808  # bytes: weights and AdamW's moments of GPT-2 124M
_PURPOSE = "checkpoints, datasets"


@dataclass(frozen=True)
class DiskSpeed:
    """Bytes per second."""

    write: float
    read: float


def disk_finding(directory: Path) -> Finding:
    """Measure the disk of a directory; nothing is left on it."""
    try:
        free = shutil.disk_usage(directory).free
        if free < 16 * _PIECE:
            found = f"almost full: {format_size(free)} free"
            return Finding("disk here", found, _PURPOSE, "lacks", "du -xsh -- * | sort -h")
        speed = measure_disk(directory, min(_MOST, free // 10))
    except OSError as error:
        found = f"can't be written to: {os_reason(error)}"
        return Finding("disk here", found, _PURPOSE, "lacks", "minigpt pretrain RECIPE --out DIR")
    found = (
        f"{format_size(free)} free, writes {speed.write / 1e6:,.0f} MB/s, "
        f"reads {speed.read / 1e6:,.0f} MB/s"
    )
    seconds = max(0.1, _CHECKPOINT / speed.write)
    return Finding("disk here", found, f"{_PURPOSE}; 124M: 1.5 GB, {seconds:,.1f} s")


def measure_disk(directory: Path, most: int = _MOST) -> DiskSpeed:
    """Write a file without a name, flush it, and read it from the disk again.

    Args:
        directory: where; a killed process leaves nothing there either.
        most: bytes to write; fewer where a second is over.

    Raises:
        OSError: the disk is full, or can't be written to.
    """
    piece = os.urandom(_PIECE)  # some file systems compress
    with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
        written, start = 0, time.perf_counter()
        while written == 0 or (written < most and time.perf_counter() - start < _SECONDS):
            written += file.write(piece)
            os.fdatasync(file.fileno())
        writing = time.perf_counter() - start
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # or memory answers
        file.seek(0)
        start = time.perf_counter()
        while file.read(_PIECE):
            pass
        reading = time.perf_counter() - start
    return DiskSpeed(written / writing, written / reading)
