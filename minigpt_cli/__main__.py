"""``minigpt``, and ``python -m minigpt_cli``, which launchers start as ranks."""

import io
import os
import sys

from minigpt_cli.core.console import error_line
from minigpt_cli.core.env_variables import check_omp_num_threads
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.signals import block_signals
from minigpt_cli.distributed.join import follow_launcher


def main() -> None:
    block_signals()  # until cli.main() handles them
    _set_environment()
    try:
        check_omp_num_threads()
        follow_launcher()
    except UserError as error:
        error_line(str(error))
        sys.exit(error.exit_code)
    from minigpt_cli import cli

    cli.main()


def _set_environment() -> None:
    """Set what libraries read when they are imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait for each other spin. Less of it loses nothing on a quiet machine, and
        # leaves the cores to others on a busy one (benchmarks/LOG.md).
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        # A GPU's memory falls less into pieces that are too small to use.
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    columns = os.environ.get("COLUMNS", "80")
    if not (columns.isdecimal() and 1 <= int(columns[:6]) <= 10_000):
        del os.environ["COLUMNS"]  # rich prints nothing for 0, and pads lines to any width
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # for names of files, which may be no text
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()
