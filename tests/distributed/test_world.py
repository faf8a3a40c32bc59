"""Ranks of one run: errors shown once, decisions taken together, work done by one for all."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from minigpt_cli.checkpoint import integrity, store
from minigpt_cli.core.errors import Outcome
from minigpt_cli.distributed import failure
from minigpt_cli.distributed.join import session
from minigpt_cli.distributed.rank_info import RankInfo
from tests.helpers.processes import ROOT, command, environment, fork, minigpt
from tests.helpers.ranks import free_port, gone, rank_environment
from tests.helpers.runs import curve
from tests.helpers.waiting import wait_until

FAILS = Path(__file__).parent / "rank_that_fails.py"
CANNOT_SAVE = Path(__file__).parent / "rank_that_cannot_save.py"


@contextmanager
def started(
    *arguments: object, cwd: Path = ROOT, stdout: int | None = None
) -> Iterator[list[subprocess.Popen[str]]]:
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)], cwd=cwd, env=rank_environment(rank, 2, port),
            stdout=stdout, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        yield ranks
    finally:
        for process in ranks:
            process.kill()


def two_ranks(*arguments: object) -> list[tuple[int, str]]:
    """(exit code, standard error) of each rank."""
    with started(*arguments) as ranks:
        said = [process.communicate(timeout=120)[1] for process in ranks]
    return [(process.returncode, text) for process, text in zip(ranks, said, strict=True)]


@pytest.mark.parametrize(
    ("when", "code", "message"),
    [
        ("before", 2, "minigpt: rank 1: the disk of this one is gone\n"),
        ("between", 2, "minigpt: rank 1: the disk of this one is gone\n"),
        ("waiting", 2, "minigpt: the data can't be made\n"),
        ("open", 2, "minigpt: rank 1: the disk of this one is gone\n"),
        ("bug", 1, "minigpt: rank 1: internal error: ZeroDivisionError: a bug (--debug"),
    ],
)
def test_one_rank_s_error_ends_all_and_is_shown_once(when: str, code: int, message: str):
    ends = two_ranks(FAILS, when, "fail")
    assert [end for end, _ in ends] == [code, code]
    said = "".join(text for _, text in ends)
    assert said.startswith(message)
    assert said.count("minigpt:") == 1
    assert "Traceback" not in said


def test_waiting_rank_ends_too(tmp_path: Path):
    """As with NCCL, whose collectives nothing interrupts; srun kills nobody by itself."""
    with started(FAILS, "hangs", "fail", cwd=tmp_path) as (waiting, _):
        assert waiting.communicate(timeout=240)[1] == ""  # said by the one that failed
    assert waiting.returncode == 2
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["status"], status["exit_code"], status["step"]) == ("failed", 2, 7)
    assert status["message"] == "rank 1: the GPU of this one is gone"


def test_failure_outlives_the_store(tmp_path: Path):
    """As rank 0 would have, which is gone: not with the error that this has caused."""
    with started(FAILS, "told", "fail", cwd=tmp_path) as (_, other):
        said = other.communicate(timeout=240)[1]
    assert (other.returncode, "minigpt: " in said) == (2, False), said  # but for what torch says


def test_a_rank_ends_soon_after_rank_0_has_died():
    (killed, _), (code, said) = two_ranks(FAILS, "dies", "fail")
    assert killed == -signal.SIGKILL
    assert code == 1
    (line,) = [line for line in said.splitlines() if line.startswith("minigpt: ")]
    # There is no checkpoint.
    assert line.startswith("minigpt: the connection to rank 0 is lost (")
    assert line.endswith(
        "; run the same command again (docs/faq.md: it-hangs)"
    )  # there is no checkpoint


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path: Path, recipe_file: Path):
    """After the next step at the latest; what is due at a step is done as in other runs."""
    script = Path(__file__).parent / "rank_that_is_stopped.py"
    with started(script, recipe_file, tmp_path, stdout=subprocess.PIPE) as ranks:
        said = [process.communicate(timeout=240) for process in ranks]
    for output, errors in said:
        found = [json.loads(line) for line in output.splitlines()]
        assert found == [
            ["in a step", 4, 0, signal.SIGTERM],
            ["in the last step", 12, 0, signal.SIGTERM],
            ["before an evaluation", 4, 0, signal.SIGTERM],  # resume begins with it
            ["before a save", 5, 0, signal.SIGTERM],
        ], errors
    for name, steps in (("in a step", [4]), ("in the last step", [12]), ("before a save", [4, 5])):
        assert [step for step, _ in store.list_steps(tmp_path / name)] == steps


@pytest.mark.parametrize("how", ["async", "sync"])
def test_one_rank_fails_the_save_of_all(tmp_path: Path, how: str):
    """And not the run, nor are the others left waiting."""
    lacks = {"memory": "can't allocate memory"} if how == "async" else {}
    lacks |= {"disk": "File too large", "tensor": "the ranks wrote 80000000 of "}
    lacks["nothing"] = "None"
    with started(CANNOT_SAVE, tmp_path / how, *lacks, stdout=subprocess.PIPE) as ranks:
        said = [process.communicate(timeout=240) for process in ranks]
    for output, errors in said:
        lines = output.splitlines()
        assert len(lines) == len(lacks), errors
        for step, (line, problem) in enumerate(zip(lines, lacks.values(), strict=True), 1):
            assert line.startswith(f"{step}: "), output
            assert problem in line, output
    ((step, checkpoint),) = store.list_steps(tmp_path / how)
    assert (step, integrity.verify(checkpoint)) == (len(lacks), [])


def test_killed_torchrun(tmp_path: Path, recipe_file: Path):
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                "1", *command()[1:]]  # fmt: skip
    arguments = ["pretrain", str(recipe_file), "--out", str(run), "--set", "train.steps=100000"]
    agent = subprocess.Popen([*torchrun, *arguments], env=environment())
    try:
        wait_until(lambda: (run / "metrics.jsonl").exists())
        status = json.loads((run / "status.json").read_text())
    finally:
        agent.kill()
        agent.wait()
    try:
        wait_until(lambda: json.loads((run / "status.json").read_text())["exit_code"] == 75)
        wait_until(lambda: gone(status["pid"]))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(status["pid"], signal.SIGKILL)


def test_shared_error_has_no_rank(tmp_path: Path):
    for arguments, line in (
        (
            ("-m", "minigpt_cli", "pretrain", "nowhere.toml"),
            f"nowhere.toml: no such recipe; there are examples in {ROOT / 'recipes'}",
        ),
        ((FAILS, "shared", "fail"), "the disk of all is gone"),
    ):
        ends = two_ranks(*arguments)
        assert [end for end, _ in ends] == [2, 2]
        assert "".join(text for _, text in ends) == f"minigpt: {line}\n"


def test_a_rank_that_lies():
    """It is taken for lost, with one line."""
    with started(Path(__file__).parent / "rank_that_lies.py", stdout=subprocess.PIPE) as ranks:
        said = [json.loads(process.communicate(timeout=240)[0]) for process in ranks]
    lost = "the connection to rank {} is lost (it sent an invalid message); run the same"
    honest, *others = said[0]
    assert honest == "honest"
    assert len(others) == 12
    assert [each for each in others if not each.startswith(lost.format(1))] == []
    assert len(said[1]) == 7 + 4 + 7  # of broadcast_json, and of run_on_rank0
    assert [each for each in said[1] if not each.startswith(lost.format(0))] == []


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (b"no JSON", 1, "the connection to "),
        (b"x" * 8_000_000, 1, "the connection to "),
        (b'{"rank": 1, "code": 0, "message": ""}', 1, "the connection to "),
        (b'{"rank": 1, "code": -1, "message": ""}', 1, "the connection to "),
        (b'{"rank": 1, "code": 1000000000, "message": ""}', 1, "the connection to "),
        (b'{"rank": 1, "code": 3, "message": "\\u001b[2J' + b"a" * 99_999 + b'"}', 3, "[2Jaaaa"),
    ],
    ids=["text", "huge", "code 0", "code -1", "code 10**9", "escape sequence"],
)
def test_a_stranger_writes_a_failure(
    tmp_path: Path, recipe_file: Path, content: bytes, code: int, message: str
):
    """It can end a run, on a network that isn't trusted, but not with a false success."""
    port, run = free_port(), tmp_path / "run"
    ranks = [
        fork(
            tmp_path / f"{rank}.txt", "pretrain", recipe_file, "--out", run, "--set",
            "train.steps=100000", **rank_environment(rank, 2, port),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        wait_until(lambda: (run / "metrics.jsonl").exists())
        TCPStore("127.0.0.1", port, wait_for_workers=False).set("minigpt/failure", content)
        assert [each.wait() for each in ranks] == [code, code]
    finally:
        for each in ranks:
            each.kill_all()
    said = "".join(each.said for each in ranks)
    assert "Traceback" not in said
    assert "\x1b" not in said
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("failed" if code == 1 else "diverged", code)
    assert status["message"].startswith(message)
    assert len(status["message"]) <= 10_000


@pytest.mark.parametrize(
    "forged",
    [b"", b"[]", b'{"rank": 0, "code": 2}', b'{"rank": 2, "code": 2, "message": ""}',
     b'{"rank": 0, "code": 0, "message": ""}', b'{"rank": 0, "code": 77, "message": ""}',
     b'{"rank": "0", "code": 2, "message": ""}', b'{"rank": 0, "code": 2, "message": 2}'],
)  # fmt: skip
def test_a_forged_failure_is_refused(forged: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "info", RankInfo(0, 2, 0, 2, "127.0.0.1", 1))
    with pytest.raises(ValueError):
        failure._read_failure(forged)


def test_no_control_characters_from_the_store(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "info", RankInfo(0, 2, 0, 2, "127.0.0.1", 1))
    told = {"rank": 1, "code": 3, "message": "a\x1b[2Jb\r\u202ec\nd\u00e9"}
    outcome = failure._read_failure(json.dumps(told).encode())
    assert outcome == Outcome(3, "a[2Jbc\nd\u00e9", is_shown_here=False)


def test_ranks_on_one_machine(tmp_path: Path, recipe_file: Path):
    """--nproc prepares, trains, evaluates, saves, and resumes on another number of processes."""
    run = tmp_path / "run"
    fp64 = ("--set", "precision.dtype=fp64")
    arguments = ("resume", run, "--or-start", recipe_file, "--json")
    begun = minigpt(*arguments, *fp64, "--set", "train.steps=6", "--nproc", 2)
    assert begun.returncode == 0, begun.stderr
    assert json.loads(begun.stdout)["step"] == 6
    assert begun.stderr.count("finished at step 6") == 1
    environment = json.loads((run / "environment.json").read_text())
    assert (environment["ranks"], environment["strategy"]) == (2, "ddp")
    assert environment["threads"] == 1  # OMP_NUM_THREADS, which the tests set, is kept to
    alone = minigpt("pretrain", recipe_file, *fp64, "--out", tmp_path / "alone", "--set",
                    "train.steps=6")  # fmt: skip
    assert alone.returncode == 0
    for line, other in zip(curve(run), curve(tmp_path / "alone"), strict=True):
        assert line == pytest.approx(other, rel=1e-10)
    again = minigpt(*arguments)  # nothing is left to do; on one process
    assert json.loads(again.stdout)["step"] == 6
    assert "ranks changed from 2 to 1" in again.stderr


def test_a_batch_that_cannot_be_shared_out_is_refused(tmp_path: Path, recipe_file: Path):
    refused = minigpt("pretrain", recipe_file, "--out", tmp_path / "run", "--nproc", 3)
    assert refused.returncode == 2
    assert refused.stderr.count("global_batch_size 8 can't be divided among 3 ranks") == 1


def test_unlike_precisions(tmp_path: Path, recipe_file: Path):
    """What ``auto`` means hangs on the device; here the ranks themselves are told differently."""
    port = free_port()
    ranks = [
        fork(
            tmp_path / f"{rank}.txt", "pretrain", recipe_file, "--out", tmp_path / "run", "--set",
            f"precision.dtype={dtype}", **rank_environment(rank, 2, port),
        )
        for rank, dtype in enumerate(("fp32", "bf16"))
    ]  # fmt: skip
    assert [each.wait() for each in ranks] == [2, 2]
    said = "".join(each.said for each in ranks)
    assert said.count("means bfloat16 and float32 on these ranks' devices") == 1, said


def test_each_rank_takes_the_cores_that_slurm_gives_it():
    code = (
        "import torch; from minigpt_cli.distributed.device import find_device; find_device(0, 2);"
        "print(torch.get_num_threads())"
    )
    env = environment() | {"SLURM_CPUS_PER_TASK": "3"}
    del env["OMP_NUM_THREADS"]
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "3\n", done.stderr


def test_sums_of_gpus_are_deterministic_unless_the_user_decides():
    """The variable is set before NCCL would start, and as the user set it on rank 1."""
    code = (
        "import os, sys\n"
        "if os.environ['RANK'] == '1': os.environ['NCCL_NVLS_ENABLE'] = '2'\n"
        "from minigpt_cli.distributed.world import start_world\n"
        "start_world()\n"
        "sys.stderr.write(os.environ['NCCL_NVLS_ENABLE'])\n"
        "sys.stderr.flush()\n"
        "os._exit(0)"
    )
    assert two_ranks("-c", code) == [(0, "0"), (0, "2")]
