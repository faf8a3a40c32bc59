"""``minigpt lr-find`` as a process: what it prints, what it leaves, how it ends."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.helpers.commands import finished, refused
from tests.helpers.processes import fork, minigpt
from tests.helpers.recipes import TINY

SHORT = ("--steps", "10", "--budget", "4", "--set", "eval.windows=4")


def test_it_leaves_one_file(recipe_file: Path, tmp_path: Path, dataset: Path):
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*")}
    done = minigpt("lr-find", recipe_file.name, *SHORT, "--json", "-o", "rates.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert json.loads((tmp_path / "rates.json").read_text()) == result
    assert sorted(os.listdir(tmp_path)) == ["rates.json", "tiny.toml"]
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*")} == before
    assert result["format"] == "minigpt-lr-find-1"
    assert list(result["advice"]) == ["optimizer.lr"]
    losses = {each["settings"]["optimizer.lr"]: each["val_loss"] for each in result["candidates"]}
    assert 0.003 in losses
    assert result["val_loss"] == min(losses.values()) == losses[result["advice"]["optimizer.lr"]]
    assert done.stderr.count("validation loss") == len(losses) + 2

    (tmp_path / "rates.json").write_text("mine")
    refused(
        2, "rates.json: already exists", "lr-find", "tiny.toml", "-o", "rates.json", cwd=tmp_path
    )
    assert (tmp_path / "rates.json").read_text() == "mine"


def test_for_a_person(recipe_file: Path, tmp_path: Path):
    text = finished("lr-find", recipe_file, *SHORT, cwd=tmp_path)
    assert text.startswith("Range test: training loss over optimizer.lr, smoothed; ")
    assert "Each candidate, trained for 4 steps under the recipe's schedule:" in text
    assert "the recipe's\n" in text
    assert "Advice: " in text
    assert max(map(len, text.splitlines())) <= 200
    assert "\x1b" not in text
    assert os.listdir(tmp_path) == ["tiny.toml"]


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        ("--from 0: expected a number above 0", ("{recipe}", "--from", "0")),
        ("--to inf: expected a number above 0", ("{recipe}", "--to", "inf")),
        ("--from 1: must be below --to 1", ("{recipe}", "--from", "1")),
        ("there is no directory no", ("{recipe}", "-o", "no/rates.json")),
        ("nowhere.toml: no such recipe", ("nowhere.toml",)),
        ("data: has no validation sequence, which the advice needs: use more data",
         ("{recipe}", "--set", "data.path={small}", "--set", "train.sequence_length={long}")),
        ("can't be divided among 3 ranks", ("{recipe}", "--nproc", "3")),
    ],
)  # fmt: skip
def test_refused(
    recipe_file: Path, tmp_path: Path, small_dataset: Path, part: str, arguments: tuple[str, ...]
):
    tokens = json.loads((small_dataset / "dataset.json").read_text())["splits"]["val"]["tokens"]
    words = {"recipe": recipe_file, "small": small_dataset, "long": tokens}  # one token is missing
    refused(2, part, "lr-find", *(each.format(**words) for each in arguments), cwd=tmp_path)
    assert os.listdir(tmp_path) == ["tiny.toml"]


def test_ctrl_c(tmp_path: Path, dataset: Path):
    (tmp_path / "tiny.toml").write_text(TINY.format(data=dataset))
    process = fork(tmp_path / "log", "lr-find", "tiny.toml", "--steps", "100000", "-o", "out.json")
    while not process.log.exists() or "range test: " not in process.said:
        assert process.code is None, process.tail
        time.sleep(0.01)
    process.send(signal.SIGINT)
    assert process.wait() == 130
    assert process.said.splitlines()[-1] == "minigpt: stopped by SIGINT"
    assert "Traceback" not in process.said
    assert sorted(os.listdir(tmp_path)) == ["log", "tiny.toml"]


@pytest.mark.slow
def test_several_ranks_find_the_same(recipe_file: Path, tmp_path: Path):
    exact = ("--set", "precision.dtype=fp64")
    alone, shared = (
        json.loads(finished("lr-find", recipe_file, *SHORT, *exact, "--json", *more, cwd=tmp_path))
        for more in ((), ("--nproc", "2", "--set", "train.micro_batch_size=2"))
    )
    assert alone["advice"] == shared["advice"]
    for one, other in zip(alone["candidates"], shared["candidates"], strict=True):
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-5)
    assert os.listdir(tmp_path) == ["tiny.toml"]
