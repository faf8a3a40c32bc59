"""Several processes of one command: start them, or join those that were started."""

import os
import sys
from pathlib import Path

from minigpt_cli.core.console import set_quiet
from minigpt_cli.core.errors import UserError
from minigpt_cli.distributed.join import is_rank0, session
from minigpt_cli.distributed.rank_info import find_rank_info


def is_launcher(nproc: int | None) -> bool:
    """Return whether this process starts the ranks of a run, instead of being one.

    Raises:
        UserError: ``--nproc`` is given, but torchrun or srun has started this process.
    """
    if nproc is None or session.launched:
        return False
    if "TORCHELASTIC_RUN_ID" in os.environ or find_rank_info() is not None:
        raise UserError(
            "--nproc starts processes, but torchrun or srun has started this one: leave out --nproc"
        )
    return nproc > 1


def launch_ranks(nproc: int | None, run: Path | None) -> int:
    """Run this same command as several processes; return their exit code.

    Args:
        nproc: number of ranks.
        run: the run directory, for status.json and messages; None if there is none.
    """
    from minigpt_cli.distributed.launch import launch

    assert nproc is not None
    return launch(sys.argv[1:], nproc=nproc, run=run)


def join_ranks() -> None:
    """Meet the other ranks, if there are any: from here on rank 0 speaks for all."""
    if (info := find_rank_info()) is None:
        return
    # Silence torch's C++ traces when a peer is lost. Must be set before torch is imported.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from minigpt_cli.distributed.world import join

    join(info)
    if not is_rank0():
        set_quiet()
