"""``minigpt``, and ``python -m minigpt_cli``, which launchers start as ranks."""

import os

from minigpt_cli.core.signals import block_signals
from minigpt_cli.distributed.join import follow_launcher


def main() -> None:
    block_signals()  # until cli.main() handles them
    follow_launcher()
    if "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait for each other spin. Less of it loses nothing on a quiet machine, and
        # is 1.7 times as fast on a busy one (benchmarks/LOG.md). Read when torch is imported.
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    from minigpt_cli import cli

    cli.main()


if __name__ == "__main__":
    main()
