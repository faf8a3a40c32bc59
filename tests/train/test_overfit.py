"""--overfit-one-batch: what is learned, what isn't, and that no run is left."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from minigpt_cli.core.errors import Diverged
from minigpt_cli.recipe import Recipe, load_recipe
from minigpt_cli.train.overfit import overfit_one_batch
from tests.helpers.commands import refused
from tests.helpers.models import saved_model
from tests.helpers.processes import ROOT, fork, minigpt
from tests.helpers.waiting import wait_until
from tests.train.test_finetune import recipe

MakeRecipe = Callable[..., Recipe]


def test_a_batch_is_learned(recipe_file: Path, tmp_path: Path):
    done = minigpt("pretrain", recipe_file, "--overfit-one-batch", "--json", "--set",
                   "optimizer.lr=1e-2", "--set", "model.dropout=0.5", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["learned"] is True
    assert found["loss"] < 0.1
    assert 10 < found["steps"] < 200
    assert found["sequences"] == 4  # a micro-batch: one pass forward and backward
    assert "one batch was learned: " in done.stderr
    assert os.listdir(tmp_path) == ["tiny.toml"]


def test_a_batch_is_not_learned(recipe_file: Path, tmp_path: Path):
    """At a rate that is far too low; the steps are as quick as can be."""
    settings = (
        "optimizer.lr=1e-9", "train.micro_batch_size=1", "train.sequence_length=4",
        "model.num_hidden_layers=1", "precision.dtype=fp32",
    )  # fmt: skip
    overrides = [word for setting in settings for word in ("--set", setting)]
    done = minigpt(
        "pretrain", recipe_file, "--overfit-one-batch", "--json", *overrides, cwd=tmp_path
    )
    assert done.returncode == 3
    found = json.loads(done.stdout)
    assert (found["learned"], found["steps"]) == (False, 500)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("minigpt: one batch was not learned: its loss is ")
    assert "optimizer.lr" in line
    assert os.listdir(tmp_path) == ["tiny.toml"]


def test_a_batch_that_makes_it_diverge(make_recipe: MakeRecipe):
    with pytest.raises(Diverged, match=r"one batch makes training diverge: .*optimizer\.lr"):
        overfit_one_batch(make_recipe("optimizer.lr=1e30", "schedule.warmup_steps=0"))


def test_adapters_learn_a_batch(tmp_path: Path, license_dataset: Path):
    _, base = saved_model("qwen3", tmp_path / "base", license_dataset)
    file = recipe(tmp_path, base, license_dataset, lora="dropout = 0.3")
    found = overfit_one_batch(
        load_recipe(file, ["train.micro_batch_size=1", "optimizer.lr=0.05", "lora.rank=16"])
    )
    assert found.is_learned
    assert found.sequences == 1


@pytest.mark.parametrize("command", [("pretrain", "--overfit-one-batch"), ("lr-find",)])
def test_no_data_is_prepared_for_a_model_that_cannot_be(
    command: tuple[str, ...], tmp_path: Path, dataset: Path
):
    """That takes hours; a start checks the same before it."""
    (tmp_path / "text.txt").write_text((ROOT / "LICENSE").read_text())
    tokenizer = f'path = "{dataset / "tokenizer.json"}"'
    text = (ROOT / "recipes/tiny.toml").read_text().replace("train_vocab = 4096", tokenizer)
    (tmp_path / "tiny.toml").write_text(text)
    source = ("--set", "data.source.kind=files", "--set", "data.source.path=text.txt")
    for setting, part in (
        ("model.num_key_value_heads=3", "num_key_value_heads"),
        ("model.vocab_size=100", "vocab_size 100 is too small"),
    ):
        refused(2, part, *command, "tiny.toml", *source, "--set", setting, cwd=tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["text.txt", "tiny.toml"]


def test_stopped_by_a_signal(recipe_file: Path, tmp_path: Path):
    log = tmp_path / "log"
    log.touch()
    process = fork(log, "pretrain", recipe_file, "--overfit-one-batch", "--set",
                   "optimizer.lr=1e-9", "--set", "train.micro_batch_size=8")  # fmt: skip
    wait_until(lambda: "step 1/500" in process.said, process)
    process.send(signal.SIGINT)
    assert process.wait() == 130
    assert process.said.splitlines()[-1] == "minigpt: stopped by SIGINT"
    assert sorted(os.listdir(tmp_path)) == ["log", "tiny.toml"]


def test_no_run_directory_is_asked_for(recipe_file: Path, tmp_path: Path):
    refused(2, "leave out --out", "pretrain", recipe_file, "--overfit-one-batch", "--out",
            tmp_path / "run")  # fmt: skip
