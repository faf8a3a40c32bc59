"""A process's place among the ranks of a run, read from its environment.

torchrun and ``--nproc`` set RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT; srun sets variables of its own.
"""

import os
import re
import subprocess
from dataclasses import dataclass

from minigpt_cli.core.env_variables import env_int
from minigpt_cli.core.errors import UserError

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class RankInfo:
    """One process among the ranks of a run."""

    rank: int
    size: int
    local_rank: int  # among the ranks on this machine
    local_size: int  # number of ranks on this machine
    address: str  # of the store
    port: int  # of the store
    agent_store: bool = False  # whether torchrun hosts that store; else rank 0 does

    @property
    def one_machine(self) -> bool:
        return self.local_size == self.size


def find_rank_info() -> RankInfo | None:
    """Read this process's rank from the environment.

    Returns:
        None if nothing started this process as one of several.

    Raises:
        UserError: the variables are incomplete or contradict one another.
    """
    env = os.environ
    if _integer("WORLD_SIZE", 1) > 1:
        needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if not env.get(name)]:
            raise UserError(
                f"WORLD_SIZE is {env['WORLD_SIZE']}, but {', '.join(missing)} not set: start with "
                "torchrun, srun or --nproc"
            )
        local_rank = _integer("LOCAL_RANK", 0)
        info = RankInfo(
            rank=_integer("RANK"),
            size=_integer("WORLD_SIZE"),
            local_rank=local_rank,
            local_size=_integer("LOCAL_WORLD_SIZE", None if local_rank else 1),
            address=env["MASTER_ADDR"],
            port=_integer("MASTER_PORT"),
            agent_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    elif "RANK" not in env and _integer("SLURM_STEP_NUM_TASKS", 1) > 1:
        info = _slurm_rank_info()
    else:
        return None
    if not (
        0 <= info.rank < info.size
        and 0 <= info.local_rank < info.local_size <= info.size
        and 0 < info.port < 2**16
    ):
        raise UserError(f"the environment describes no rank of a run: {info}")
    return info


def _slurm_rank_info() -> RankInfo:
    """Read srun's variables. They name no address to meet at: the first node is used."""
    env = os.environ
    tasks = env.get("SLURM_STEP_TASKS_PER_NODE", "")  # of the step, by node, e.g. 4(x2),3
    pairs = re.findall(r"(\d+)(?:\(x(\d{1,6})\))?", tasks)
    counts = [int(count) for count, times in pairs for _ in range(int(times or 1))]
    node, size = _integer("SLURM_NODEID"), _integer("SLURM_STEP_NUM_TASKS")
    if sum(counts) != size or not 0 <= node < len(counts):
        raise UserError(f"node {node} and {size} tasks don't fit {tasks!r} tasks per node")
    address = env.get("MASTER_ADDR")
    if not address:  # on one node no name has to be looked up
        nodes = env.get("SLURM_STEP_NODELIST", "")
        address = LOOPBACK if len(counts) == 1 else _first_host(nodes)
    default_port = 20_000 + (7 * _integer("SLURM_JOB_ID") + _integer("SLURM_STEP_ID")) % 10_000
    return RankInfo(
        rank=_integer("SLURM_PROCID"),
        size=size,
        local_rank=_integer("SLURM_LOCALID"),
        local_size=counts[node],
        address=address,
        port=_integer("MASTER_PORT", default_port),
    )


def _integer(name: str, default: int | None = None) -> int:
    return env_int(name, default, hint="start with torchrun, srun or --nproc")


def _first_host(nodes: str) -> str:
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        return listing.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f"scontrol can't tell the first host of {nodes!r}: set MASTER_ADDR to it"
        ) from None
