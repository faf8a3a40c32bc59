"""Several processes of one command: start them, or join those that were started."""

import os
import sys
import threading
from pathlib import Path

from minigpt_cli.core.errors import UserError


def is_launcher(nproc: int | None) -> bool:
    """Return whether this process starts the ranks of a run, instead of being one.

    Raises:
        UserError: ``--nproc`` is given, but torchrun or srun has started this process.
    """
    if nproc is None or "follow-parent" in {thread.name for thread in threading.enumerate()}:
        return False
    if is_one_of_many():
        raise UserError(
            "--nproc starts processes, but torchrun or srun has started this one: leave out --nproc"
        )
    return nproc > 1


def launch_ranks(nproc: int | None, run: Path) -> int:
    """Run this same command as several processes; return their exit code.

    Args:
        nproc: number of ranks.
        run: the run directory, for messages.
    """
    from minigpt_cli.distributed.launch import launch

    assert nproc is not None
    return launch(sys.argv[1:], nproc=nproc)


def join_ranks() -> None:
    """Meet the other ranks, if there are any: from here on rank 0 speaks for all."""
    from minigpt_cli.distributed.watch import follow_parent

    threads = {thread.name for thread in threading.enumerate()}
    if "TORCHELASTIC_RUN_ID" in os.environ and "follow-parent" not in threads:
        follow_parent(os.getppid())  # a torchrun that is killed leaves its workers behind
    if is_one_of_many():
        # Silence torch's C++ traces when a peer is lost. Must be set before torch is imported.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from minigpt_cli.core.console import set_quiet
        from minigpt_cli.distributed.world import is_rank0, join

        join()
        if not is_rank0():
            set_quiet()


def is_one_of_many() -> bool:
    """Return whether torchrun, srun or ``--nproc`` started this process as one of several."""
    sizes = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    return any(int(size) > 1 for size in sizes)
