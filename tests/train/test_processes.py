"""Real processes that have yet to import everything, and signals that tests/faults doesn't send."""

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.processes import command, environment, minigpt
from tests.helpers.recipes import TINY
from tests.helpers.runs import curve, steps_logged
from tests.helpers.waiting import wait_until

Start = Callable[..., subprocess.Popen[str]]
STEPS = 60
SETTINGS = ("--set", f"train.steps={STEPS}", "--set", "checkpoint.every_steps=1",
            "--set", "checkpoint.keep_last=3", "--set", "precision.dtype=fp32")  # fmt: skip


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "tiny.toml").write_text(TINY.format(data=dataset))
    done = minigpt("pretrain", folder / "tiny.toml", "--out", folder / "run", *SETTINGS)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_closed_terminal(tmp_path: Path, recipe_file: Path, straight: Path, start: Start):
    """SIGHUP; tests/faults sends the others, at every phase."""
    run, signum, code = tmp_path / "run", signal.SIGHUP, 75
    seldom = ("--set", "checkpoint.every_steps=1000")
    process = start("pretrain", recipe_file, "--out", run, *SETTINGS, *seldom)
    wait_until(lambda: steps_logged(run) > 3, process)
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


def test_an_ignored_hangup_stays_ignored(tmp_path: Path, recipe_file: Path):
    """nohup minigpt ... goes on when the terminal is gone."""
    run = tmp_path / "run"
    arguments = command("pretrain", recipe_file, "--out", run, *SETTINGS)
    process = subprocess.Popen(
        ["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *arguments], env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    wait_until(lambda: steps_logged(run) > 3, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 0
    assert steps_logged(run) == STEPS


def test_signal_stops_tokenize(tmp_path: Path, start: Start, dataset: Path):
    """The files of a dataset that was stopped halfway equal those of one that was not."""
    text = "".join(f"line {n} of a text that is long enough to be stopped in\n" for n in range(999))
    (tmp_path / "corpus").mkdir()
    for n in range(150):
        (tmp_path / f"corpus/{n}.txt").write_text(f"{n}\n{text}")
    tokenizer = dataset / "tokenizer.json"
    arguments = ("tokenize", tmp_path / "corpus", "--tokenizer", tokenizer, "--out")
    stopped = start(*arguments, tmp_path / "stopped")
    wait_until(lambda: list((tmp_path / "stopped").glob("*.npy*")), stopped)
    stopped.send_signal(signal.SIGTERM)
    errors = stopped.communicate(timeout=60)[1]
    assert stopped.returncode == 75, errors
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
