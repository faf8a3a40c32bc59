"""What an incident says about the batch is what lies in the shards; and it is standard JSON."""

import json
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from minigpt_cli.checkpoint import integrity, store
from minigpt_cli.core.errors import Diverged
from minigpt_cli.data.order import sample_ids
from minigpt_cli.prepare.sources import Source
from minigpt_cli.prepare.tokenize import tokenize
from minigpt_cli.recipe import Recipe
from minigpt_cli.report.incident_list import list_incidents
from minigpt_cli.train.loop import fit
from minigpt_cli.train.start import start_run
from tests.helpers.processes import minigpt

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 1,000 tokens: many sequences reach into the next one."""
    out = tmp_path_factory.mktemp("sharded") / "data"
    source = Source("files", (f"{sysconfig.get_path('stdlib')}/json/*.py",))
    tokenize(source, out, train_vocab=320, val_fraction=0.2, workers=1, shard_tokens=1000)
    return out


def standard_json(file: Path) -> Any:
    def refuse(literal: str) -> None:
        raise AssertionError(f"{literal} is not JSON")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def poison_from(run: Any, micro_batch: int) -> None:
    """Every gradient from this micro-batch on is not a number."""
    calls = iter(range(100_000))
    run.context.model.layers[0].mlp.up_proj.weight.register_hook(
        lambda grad: grad * math.nan if next(calls) >= micro_batch else grad
    )


def test_incident_has_step_and_text(tmp_path: Path, make_recipe: MakeRecipe, sharded: Path):
    recipe = make_recipe(
        "precision.dtype=fp32", "train.sequence_length=250", "train.global_batch_size=24",
        "train.micro_batch_size=24", "log.every_steps=5", data=sharded,
    )  # fmt: skip
    run, state = start_run(recipe, tmp_path / "run")
    poison_from(run, 6)
    with pytest.raises(Diverged, match=r"step-00000007-nonfinite\.json"):
        fit(run, state)
    (file,) = (tmp_path / "run/incidents").iterdir()
    assert file.name == "step-00000007-nonfinite.json"
    incident = standard_json(file)
    assert (incident["kind"], incident["step"], incident["ranks"]) == ("nonfinite", 7, [0])
    assert incident["bad_steps"] == 2  # 7 and 8: at 8 an evaluation is due, and the host looks
    assert [each["step"] for each in incident["others"]] == [8]
    assert 3 < incident["loss"] < 7
    assert incident["grad_norm"] == "nan"
    assert incident["loss_scale"] is incident["loss_limit"] is None
    assert incident["lr"] == pytest.approx(
        3e-3 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (7 - 3) / (12 - 3))))
    )
    for step, each in ((7, incident), (8, incident["others"][0])):
        shards = {path.name: np.load(path) for path in sorted(sharded.glob("train-*.npy"))}
        assert len(shards) > 3
        whole = np.concatenate(list(shards.values()))
        starts = dict(zip(shards, np.cumsum([0, *map(len, shards.values())]), strict=False))
        ids = sample_ids(1337, step - 1, 24, (len(whole) - 1) // 250)
        assert [window["window"] for window in each["windows"]] == ids.tolist()
        tokenizer = Tokenizer.from_file(str(sharded / "tokenizer.json"))
        crossing = 0
        for window in each["windows"]:
            tokens = shards[window["shard"]][window["offset"] :]
            crossing += len(tokens) < 251
            first = starts[window["shard"]] + window["offset"]
            assert first == window["window"] * 250
            text = tokenizer.decode(whole[first : first + 251].tolist(), skip_special_tokens=False)
            assert window["text"] == text[:200]
            assert len(window["text"]) == 200
        assert crossing
    (reported,), problems = list_incidents(tmp_path / "run")
    assert problems == []
    assert (reported.kind, reported.steps) == ("nonfinite", (7, 8))
    assert reported.reason.endswith("gradient norm nan, 2 steps were skipped")
    assert reported.batch[0].endswith(incident["windows"][0]["text"])


def test_under_fp16_an_incident_has_the_loss_scale(tmp_path: Path, make_recipe: MakeRecipe):
    run, state = start_run(make_recipe("precision.dtype=fp16"), tmp_path)
    with torch.no_grad():
        run.context.model.norm.weight.fill_(math.nan)
    with pytest.raises(Diverged):
        fit(run, state)
    incident = standard_json(tmp_path / "incidents/step-00000001-nonfinite.json")
    assert incident["loss"] == "nan"
    assert incident["loss_scale"] == 2.0**16
    assert store.list_steps(tmp_path) == []


def test_diverging_for_real_as_a_process(tmp_path: Path, recipe_file: Path):
    """A learning rate without bounds: exit code 3, what happened on disk, good checkpoints kept."""
    run = tmp_path / "run"
    done = minigpt(
        "pretrain", recipe_file, "--out", run, "--set", "optimizer.lr=1e4", "--set",
        "schedule.name=step", "--set", "schedule.milestones=[4]", "--set", "schedule.gamma=1e16",
        "--set", "schedule.warmup_steps=4", "--set", "precision.dtype=fp32", "--set",
        "checkpoint.keep_last=1", "--set", "checkpoint.every_steps=1", "--set",
        "log.every_steps=100",
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("minigpt: training diverged: loss or gradient was not finite at step ")
    assert "Traceback" not in done.stderr
    (file,) = (run / "incidents").iterdir()
    assert str(file) in last
    incident = standard_json(file)
    assert f"at step {incident['step']};" in last
    assert len(incident["windows"]) == 8
    assert standard_json(run / "status.json")["status"] == "diverged"
    assert standard_json(run / "status.json")["exit_code"] == 3
    (kept,) = store.list_steps(run)
    assert kept[0] < incident["step"]
    assert integrity.verify(kept[1]) == []
    from tests.helpers.runs import tensors

    assert all(value.isfinite().all() for value in tensors(kept[1]).values())
    assert minigpt("verify", run).returncode == 0


def test_unwritable_incident(
    tmp_path: Path, make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]
):
    run, state = start_run(make_recipe("precision.dtype=fp32"), tmp_path)
    (tmp_path / "incidents").write_text("in the way")
    poison_from(run, 0)
    with pytest.raises(Diverged, match="not finite at step 1;"):
        fit(run, state)
    assert "the incident at step 1 could not be written" in capsys.readouterr().err
