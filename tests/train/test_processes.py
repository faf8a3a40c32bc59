"""Real processes and real signals: killed, stopped, resumed."""

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import command, environment, minigpt
from tests.train.test_resume import assert_same_run, curve

Start = Callable[..., subprocess.Popen[str]]
STEPS = 60
SETTINGS = ("--set", f"train.steps={STEPS}", "--set", "checkpoint.every_steps=1",
            "--set", "checkpoint.keep_last=3", "--set", "precision.dtype=fp32")  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """The run that nothing happened to."""
    from tests.conftest import TINY

    folder = tmp_path_factory.mktemp("straight")
    (folder / "tiny.toml").write_text(TINY.format(data=dataset))
    done = minigpt("pretrain", folder / "tiny.toml", "--out", folder / "run", *SETTINGS)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def steps_logged(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_text().count("grad_norm")
    except FileNotFoundError:
        return 0


def test_killed_in_training_and_in_saves_it_ends_with_the_same_weights(
    tmp_path: Path, recipe_file: Path, straight: Path, start: Start
):
    run = tmp_path / "run"
    checkpoints = run / "checkpoints"
    chance = random.Random(0)
    torn = 0
    process = start("pretrain", recipe_file, "--out", run, *SETTINGS)
    for attempt in range(1, 6):
        reached = steps_logged(run)
        wait_for(lambda: steps_logged(run) > reached + 2, process)  # noqa: B023
        if attempt % 2:  # in the middle of a save
            wait_for(lambda: list(checkpoints.glob(".writing-*")), process)
        else:
            time.sleep(chance.random() / 20)
        process.kill()
        process.communicate()
        torn += bool(list(checkpoints.glob(".writing-*")))
        for line in (run / "metrics.jsonl").read_text().splitlines():
            json.loads(line)  # whole lines only
        process = start("resume", run)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert torn, "no kill hit a save: the test tests nothing"
    assert not list(checkpoints.glob(".*"))
    assert_same_run(straight, run, STEPS)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGHUP, 75)]
)
def test_a_signal_saves_at_the_next_step_and_exits_with_its_code(
    tmp_path: Path, recipe_file: Path, straight: Path, start: Start, signum: int, code: int
):
    run = tmp_path / "run"
    seldom = ("--set", "checkpoint.every_steps=1000")
    process = start("pretrain", recipe_file, "--out", run, *SETTINGS, *seldom)
    wait_for(lambda: steps_logged(run) > 3, process)
    process.send_signal(signum)
    process.send_signal(signum)  # a second one does no harm
    _, errors = process.communicate()
    assert process.returncode == code, errors
    last = errors.strip().splitlines()[-1]
    assert last.startswith(f"minigpt: stopped by {signum.name} at step ")
    assert f"minigpt resume {run}" in last
    assert "Traceback" not in errors
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("stopped", code)
    resumed = minigpt("resume", run, "--set", "checkpoint.every_steps=1", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["step"] == STEPS
    assert json.loads((run / "status.json").read_text())["status"] == "finished"
    assert curve(run) == curve(straight)


def test_a_second_process_is_refused(tmp_path: Path, recipe_file: Path, start: Start):
    run = tmp_path / "run"
    process = start("pretrain", recipe_file, "--out", run, "--set", "train.steps=100000")
    wait_for(lambda: steps_logged(run) > 4, process)
    second = minigpt("resume", run)
    assert second.returncode == 2
    assert "another process is training in it" in second.stderr
    process.terminate()
    process.communicate()
    assert process.returncode == 75


def test_an_ignored_hangup_stays_ignored(tmp_path: Path, recipe_file: Path):
    """nohup minigpt ... goes on when the terminal is gone."""
    run = tmp_path / "run"
    arguments = command("pretrain", recipe_file, "--out", run, *SETTINGS)
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *arguments], env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    wait_for(lambda: steps_logged(run) > 3, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0
    assert steps_logged(run) == STEPS


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_stops_tokenize_with_its_code_and_it_goes_on(
    tmp_path: Path, start: Start, dataset: Path, signum: signal.Signals, code: int
):
    """The files of a dataset that was stopped halfway equal those of one that was not."""
    text = "".join(f"line {n} of a text that is long enough to be stopped in\n" for n in range(999))
    (tmp_path / "corpus").mkdir()
    for n in range(400):
        (tmp_path / f"corpus/{n}.txt").write_text(f"{n}\n{text}")
    tokenizer = dataset / "tokenizer.json"
    arguments = ("tokenize", tmp_path / "corpus", "--tokenizer", tokenizer, "--out")
    stopped = start(*arguments, tmp_path / "stopped")
    wait_for(lambda: list((tmp_path / "stopped").glob("*.npy*")), stopped)
    stopped.send_signal(signum)
    errors = stopped.communicate(timeout=60)[1]
    assert stopped.returncode == code, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("minigpt: stopped by ")
    assert not (tmp_path / "stopped/dataset.json").exists()
    for out in ("stopped", "straight"):
        done = minigpt(*arguments, tmp_path / out)
        assert done.returncode == 0, done.stderr
    shards = sorted((tmp_path / "straight").glob("*.npy"))
    assert shards
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "stopped" / shard.name).read_bytes()
