"""Processes with the null GPU preloaded."""

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.processes import ROOT


def on_null_gpu(
    library: Path, *arguments: object, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments to its end.

    Args:
        library: of ``build``.
        *arguments: of the interpreter: a script or ``-m`` and a module, and its own.
        cwd: where it runs; None: here.
        **variables: further environment variables, as ``NULLGPU_DEVICES="2"``.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(library.parent),
        "PYTORCH_ALLOC_CONF": "expandable_segments:False",  # it has no virtual addresses
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # starting a pool of processes costs more
        "COLUMNS": "200",
    }
    return subprocess.run(
        [sys.executable, *map(str, arguments)], env=environment | variables, cwd=cwd,
        capture_output=True, text=True,
    )  # fmt: skip


def script_output(library: Path, script: str, *arguments: object, **variables: str) -> str:
    """Run a script of this folder; return the last line that it prints."""
    done = on_null_gpu(library, ROOT / "tests/nullgpu" / script, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]
