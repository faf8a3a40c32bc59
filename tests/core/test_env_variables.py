"""Whatever the environment holds, a command ends with one line."""

import subprocess

import pytest

from minigpt_cli.core.env_variables import check_omp_num_threads, env_int
from minigpt_cli.core.errors import UserError
from tests.helpers.processes import command, environment

TWO = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0",
       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "7"}  # fmt: skip
SHARED = TWO | {"LOCAL_WORLD_SIZE": "1"}


@pytest.mark.parametrize(
    ("variables", "start"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc', not an integer: start with"),
        (TWO | {"RANK": ""}, "WORLD_SIZE is 2, but RANK not set: start with"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_NODEID is not set: start with"),
        (TWO | {"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc', not an integer: start with"),
        (TWO | {"MASTER_ADDR": ""}, "WORLD_SIZE is 2, but MASTER_ADDR not set: start with"),
        (SHARED | {"MASTER_ADDR": "no-such-host.invalid"}, "can't reach no-such-host.invalid:7"),
        (SHARED | {"MASTER_ADDR": "a" * 70}, f"can't reach {'a' * 70}:7"),
        (TWO | {"MINIGPT_STORE_FD": "abc"}, "MINIGPT_STORE_FD is 'abc', not an integer"),
        (TWO | {"MINIGPT_STORE_FD": "999"}, "can't reach 127.0.0.1:7"),
    ],
)
def test_a_wrong_place_among_ranks(variables: dict[str, str], start: str):
    check(("pretrain", "x.toml"), variables, start)


@pytest.mark.parametrize("arguments", [("verify", "."), ("pretrain", "x.toml"), ("--help",)])
def test_wrong_in_every_command(arguments: tuple[str, ...]):
    for name, value in (
        ("OMP_NUM_THREADS", "abc"),
        ("OMP_NUM_THREADS", "0"),
        ("MINIGPT_LAUNCHER_PID", "abc"),
        ("MINIGPT_LAUNCHER_PID", "-5"),
    ):
        check(arguments, {name: value}, f"{name} is ")


def check(arguments: tuple[str, ...], variables: dict[str, str], start: str) -> None:
    done = subprocess.run(
        command(*arguments), env=environment() | variables, text=True, capture_output=True
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"minigpt: {start}")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_integers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", " 12 ")
    assert env_int("SLURM_CPUS_PER_TASK") == 12
    for text in ("abc", "1.5", "-1", "9" * 5000):
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", text)
        with pytest.raises(UserError, match=r"SLURM_CPUS_PER_TASK is .* or unset it"):
            env_int("SLURM_CPUS_PER_TASK", 3)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "")
    assert env_int("SLURM_CPUS_PER_TASK", 3) == 3
    with pytest.raises(UserError, match="SLURM_CPUS_PER_TASK is not set: ask for it"):
        env_int("SLURM_CPUS_PER_TASK", hint="ask for it")


def test_numbers_of_threads(monkeypatch: pytest.MonkeyPatch):
    for text in ("1", "4, 2", "64"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        check_omp_num_threads()
    for text in ("abc", "-1", "4,", "\u0663", "1e3", "9" * 5000):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        with pytest.raises(UserError, match="not a number of threads"):
            check_omp_num_threads()
