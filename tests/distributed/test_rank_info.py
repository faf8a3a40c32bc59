"""How a rank finds its place."""

import subprocess
from pathlib import Path

import pytest

from minigpt_cli.core.errors import UserError
from minigpt_cli.distributed.rank_info import RankInfo, find_rank_info
from tests.helpers.processes import command, environment
from tests.helpers.ranks import rank_environment

SLURM = {
    "SLURM_STEP_NUM_TASKS": "11", "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_NODEID": "2", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-3]", "MASTER_ADDR": "n1",
}  # fmt: skip
TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "99",
    "MASTER_ADDR": "node1", "TORCHELASTIC_USE_AGENT_STORE": "True",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in {*SLURM, *TORCHRUN}:
        monkeypatch.delenv(name, raising=False)


def test_srun(monkeypatch: pytest.MonkeyPatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert find_rank_info() == RankInfo(9, 11, 1, 3, "n1", 20_000 + 7 * 77)
    monkeypatch.delenv("MASTER_ADDR")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        find_rank_info()


def test_torchrun(monkeypatch: pytest.MonkeyPatch):
    assert find_rank_info() is None
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert find_rank_info() == RankInfo(3, 4, 1, 2, "node1", 99, agent_store=True)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (TORCHRUN | {"RANK": "4"}, "describes no rank"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is -1, expected at least 0"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "but MASTER_ADDR not set"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "describes no rank"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "5"}, "describes no rank"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "describes no rank"),
        (TORCHRUN | {"MASTER_PORT": "a"}, "MASTER_PORT is 'a', not an integer"),
        (TORCHRUN | {"RANK": ""}, "but RANK not set"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not an integer"),
        ({"WORLD_SIZE": "2"}, "but RANK, MASTER_ADDR, MASTER_PORT not set"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "4(x2"}, "node 2 and 11 tasks don't fit '4(x2'"),
        (SLURM | {"SLURM_NODEID": "3"}, "node 3 and 11 tasks don't fit"),
        (SLURM | {"SLURM_STEP_ID": ""}, "SLURM_STEP_ID is not set"),
    ],
)
def test_a_wrong_environment(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        find_rank_info()


@pytest.mark.parametrize("nproc", ["1", "2"])
def test_launchers_do_not_nest(tmp_path: Path, nproc: str):
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "1"}
    for variables in (rank_environment(0, 2, 1), environment() | SLURM, environment() | torchrun):
        done = subprocess.run(
            command("pretrain", "x.toml", "--nproc", nproc), env=variables, text=True,
            capture_output=True, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 2
        assert done.stderr == (
            "minigpt: --nproc starts processes, but torchrun or srun has started this one: leave "
            "out --nproc\n"
        )
