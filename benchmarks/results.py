"""Results of benchmarks: JSON files with every raw sample, the machine and the versions."""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "results"
FORMAT = "minigpt-benchmark-1"
PACKAGES = ("torch", "transformers", "litgpt", "tokenizers", "numpy")
# What decides about the speed of matrix products on x86.
CPU_FLAGS = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_tile"}
QUIET_LOAD = 0.5


@dataclass(frozen=True)
class Row:
    """One figure of one program.

    Attributes:
        work: what was done, such as ``gpt2``; rows with the same work are compared.
        who: the program: ``minigpt``, ``nanoGPT``, ``litgpt``, ``HF``, or ``limit``.
        how: its setting, such as ``bf16, compiled``.
        unit: of the samples.
        samples: every measured value, a list for each process, in the order of measurement.
    """

    work: str
    who: str
    how: str
    unit: str
    samples: list[list[float]]

    @property
    def median(self) -> float:
        """The median over the processes of each process's median."""
        return statistics.median(statistics.median(each) for each in self.samples)


def write_results(file: Path, rows: Iterable[Row], *, busy: bool, peer_python: Path | None) -> None:
    """Write rows with all that a reader needs to judge them.

    Args:
        file: the JSON file.
        rows: what was measured.
        busy: whether other work ran beside the measurement.
        peer_python: the interpreter of the peers' environment.
    """
    head = {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        # A result is no change of the program.
        "uncommitted_changes": bool(
            _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
        ),
        "busy": busy,
        "threads": threads(),
        "machine": _machine(),
        "versions": _versions(peer_python),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)  # a line for each row
    text = json.dumps(head, indent=1).removesuffix("\n}")
    file.write_text(f'{text},\n "rows": [\n{lines}\n ]\n}}\n')


def read_results(file: Path) -> tuple[dict[str, Any], list[Row]]:
    """Return (the facts about the measurement, the rows) of a file of ``write_results``."""
    content = json.loads(file.read_text())
    assert content["format"] == FORMAT, file
    return content, [Row(**row) for row in content.pop("rows")]


def threads() -> int:
    """Return the threads that torch uses in the measured processes."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def machine_is_busy() -> bool:
    """Return whether other programs have used the processors in the last minute."""
    return os.getloadavg()[0] > QUIET_LOAD


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(
        (part.strip() for part in line.split(":", 1)) for line in info.splitlines() if ":" in line
    )
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "flags": sorted(CPU_FLAGS & set(fields.get("flags", "").split())),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "load": os.getloadavg(),
    }


def _versions(peer_python: Path | None) -> dict[str, str]:
    found = {"python": platform.python_version()}
    if peer_python is not None:
        code = (
            "import importlib.metadata as m, json\n"
            f"names = {{d.metadata['Name'] for d in m.distributions()}} & set({PACKAGES!r})\n"
            "print(json.dumps({name: m.version(name) for name in sorted(names)}))"
        )
        output = subprocess.run([peer_python, "-c", code], capture_output=True, check=True).stdout
        found |= json.loads(output)
    return found | {
        name: importlib.metadata.version(name) for name in ("torch", "tokenizers", "numpy")
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()
