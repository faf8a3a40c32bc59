"""Whole commands on the null GPU.

It computes nothing: weights stay as they were drawn, and the host reads old bytes as losses. So
nothing here looks at a loss. It has no cuDNN either, which torch takes for attention in bf16. With
``NULLGPU_TRUE=1`` the check before a save ("are all weights finite?") reads true.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minigpt_cli.model.config import config_from_recipe
from minigpt_cli.model.gpt import GPT, initialize_weights
from minigpt_cli.recipe import load_recipe
from tests.helpers.processes import ROOT
from tests.nullgpu.counts import read_report
from tests.nullgpu.process import on_null_gpu

RECIPE = f"""
[data]
path = "data"
[data.source]
kind = "files"
path = ["{ROOT}/LICENSE"]
val_fraction = 0.2
[data.tokenizer]
train_vocab = 320
[model]
family = "llama"
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
vocab_size = 384
[train]
steps = 6
global_batch_size = 8
micro_batch_size = 4
sequence_length = 32
[optimizer]
lr = 3e-3
[precision]
compile = false
[checkpoint]
every_minutes = 0
[log]
every_steps = 1000
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, library: Path) -> Path:
    """A directory with a recipe, its dataset and a finished run."""
    place = tmp_path_factory.mktemp("commands")
    (place / "recipe.toml").write_text(RECIPE)
    assert minigpt(library, place, "pretrain", "recipe.toml", "--out", "run")[0] == 0
    return place


def minigpt(
    library: Path, place: Path, *arguments: object, finite: bool = True, **variables: str
) -> tuple[int, str, str]:
    """Run a command; return its exit code, its output and the last line of its log."""
    if finite:
        variables["NULLGPU_TRUE"] = "1"
    done = on_null_gpu(library, "-m", "minigpt_cli", *arguments, cwd=place, **variables)
    return done.returncode, done.stdout, (done.stderr.splitlines() or [""])[-1]


def test_a_step_that_is_not_logged_waits_for_nothing(library: Path, place: Path):
    """A run of 18 steps waits as often as one of 6. The first and the last step are logged."""
    waits = {}
    for steps in (6, 18):
        report = place / f"waits-{steps}"
        code, _, log = minigpt(
            library, place, "pretrain", "recipe.toml", "--out", f"run-{steps}",
            "--set", f"train.steps={steps}", NULLGPU_REPORT=str(report),
        )  # fmt: skip
        assert code == 0, log
        found = read_report(report)
        waits[steps] = found.total("wait")
        assert found.total("kernel") > 100 * steps
    assert waits[6] == waits[18]


def test_a_checkpoint_holds_the_weights(place: Path):
    """Nothing has updated the matrices, so they are those of the seed, drawn on the host."""
    recipe = load_recipe(place / "run/recipe.toml")
    model = GPT(config_from_recipe(recipe, 320))
    initialize_weights(model, recipe.train.seed)
    saved: dict[str, torch.Tensor] = {}
    for file in (place / "run/checkpoints/step-00000006").glob("*.safetensors"):
        saved |= load_file(file)
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    assert len(matrices) > 10
    for name, weight in matrices.items():
        assert torch.equal(saved[f"weights.{name}"], weight), name


def test_a_run_is_resumed_evaluated_sampled_and_exported(library: Path, place: Path):
    assert minigpt(library, place, "resume", "run", "--set", "train.steps=9")[0] == 0
    assert (place / "run/checkpoints/step-00000009").is_dir()
    code, printed, _ = minigpt(library, place, "eval", "run", "--dtype", "fp32", "--json")
    assert (code, json.loads(printed)["tokens"] > 100) == (0, True)
    code, printed, _ = minigpt(
        library, place, "sample", "run", "--prompt", "The", "--max-new-tokens", 4,
        "--dtype", "fp32", "--json",
    )  # fmt: skip
    assert code == 0
    assert len(json.loads(printed)["completions"]) == 1


def test_weights_that_are_not_finite_are_not_saved(library: Path, place: Path):
    arguments = ("pretrain", "recipe.toml", "--out", "diverged")
    code, _, log = minigpt(library, place, *arguments, finite=False)
    assert code == 3
    assert "weights or optimizer state are not finite at step 6; this step is not saved" in log
    assert not any((place / "diverged/checkpoints").glob("step-*"))


def test_out_of_memory_ends_with_advice_that_helps(library: Path, place: Path):
    """Each way out that the message names fits into the same memory."""
    large = [
        "model.num_hidden_layers=8", "train.global_batch_size=16", "train.micro_batch_size=16",
        "train.sequence_length=256", "train.steps=2", "eval.windows=1",
    ]  # fmt: skip

    def train(name: str, *settings: str) -> tuple[int, str]:
        code, _, log = minigpt(
            library, place, "pretrain", "recipe.toml", "--out", name,
            *[f"--set={each}" for each in (*large, *settings)], NULLGPU_MEMORY="140000000",
        )  # fmt: skip
        return code, log

    code, log = train("too-large")
    assert code == 2, log
    assert log.startswith("minigpt: out of memory: "), log
    assert "of the GPU are free" in log
    for number, setting in enumerate(
        ("train.micro_batch_size=1", "train.activation_checkpointing=true")
    ):
        assert setting.partition("=")[0] in log
        code, log_of_way = train(f"way-{number}", setting)
        assert code == 0, log_of_way
