"""torch.compile as a setting: the same numbers, the same names, and eager where it can't be."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minigpt_cli.distributed.world import World
from minigpt_cli.model.gpt import initialize_weights
from minigpt_cli.model.precision import compiles
from minigpt_cli.recipe import PrecisionSettings, Recipe
from minigpt_cli.report import metrics
from minigpt_cli.train.trainer import build_context, warm_up
from tests.helpers.processes import ROOT, command, environment, fork, minigpt
from tests.helpers.ranks import free_port, rank_environment

COMPILED = (
    "--set", "precision.compile=true", "--set", "precision.dtype=fp32", "--set", "train.steps=4",
)  # fmt: skip


def pretrain(recipe: Path, out: Path, compiled: bool, **variables: str) -> str:
    arguments = (
        "pretrain", recipe, "--out", out, "--set", f"precision.compile={str(compiled).lower()}",
        "--set", "precision.dtype=fp32", "--set", "train.steps=4",
    )  # fmt: skip
    if compiled:
        done = subprocess.run(
            command(*arguments), env=environment() | variables, capture_output=True, text=True
        )
    else:
        done = minigpt(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stderr


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in metrics.read(run) if "loss" in line]


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs g++")
def test_a_compiled_run_equals_an_eager_one(tmp_path: Path, recipe_file: Path):
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    pretrain(recipe_file, eager, False)
    errors = pretrain(recipe_file, compiled, True)
    assert "torch.compile failed" not in errors
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
    manifests = [run / "checkpoints/step-00000004/manifest.json" for run in (eager, compiled)]
    names = [path.read_text().count("_orig_mod") for path in manifests]
    assert names == [0, 0]


def test_no_compiler(tmp_path: Path, recipe_file: Path):
    nowhere = {
        "CXX": str(tmp_path / "no-such-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "PATH": os.path.dirname(sys.executable),
    }
    errors = pretrain(recipe_file, tmp_path / "run", True, **nowhere)
    assert "warning: torch.compile failed, training goes on without it" in errors
    pretrain(recipe_file, tmp_path / "eager", False)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "eager"), rel=1e-6)


@pytest.mark.slow
def test_no_compiler_on_one_rank(tmp_path: Path, recipe_file: Path):
    port = free_port()
    nowhere = {"CXX": str(tmp_path / "no-such-compiler"), "PATH": os.path.dirname(sys.executable)}
    ranks = []
    for rank, missing in enumerate(({}, nowhere)):
        cache = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / f"cache-{rank}")}
        variables = rank_environment(rank, 2, port) | cache | missing
        arguments = ("pretrain", recipe_file, "--out", tmp_path / "run", *COMPILED)
        ranks.append(fork(tmp_path / f"{rank}.txt", *arguments, **variables))
    assert [each.wait() for each in ranks] == [0, 0], ranks[0].said
    assert ranks[0].said.count("warning: torch.compile failed, training goes on without it") == 1
    pretrain(recipe_file, tmp_path / "eager", False)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)


@pytest.mark.parametrize("reason", ["no kernel", "[enforce] DefaultCPUAllocator: can't allocate"])
def test_a_failed_warm_up_leaves_no_gradients(
    make_recipe: Callable[..., Recipe], capsys: pytest.CaptureFixture[str], reason: str
):
    context = build_context(
        make_recipe("precision.dtype=fp32"), 320, World(0, 1, torch.device("cpu"))
    )
    initialize_weights(context.model, seed=1)
    for layer in context.model.layers:
        layer.forward = layer.forward  # as compile_blocks does
    hooked = context.model.layers[0].mlp.up_proj.weight  # among the last to get a gradient

    def fail(_: torch.Tensor) -> None:
        raise RuntimeError(reason)

    hooked.register_hook(fail)
    if reason == "no kernel":
        warm_up(context, 32)
        warning = f"torch.compile failed, training goes on without it: {reason}"
        assert warning in capsys.readouterr().err
    else:
        with pytest.raises(RuntimeError, match="can't allocate"):
            warm_up(context, 32)
    assert all(parameter.grad is None for parameter in context.model.parameters())


@pytest.mark.skipif(not shutil.which("g++"), reason="compiling for a CPU needs g++")
@pytest.mark.parametrize("recompute", [pytest.param("false", marks=pytest.mark.slow), "selective"])
def test_nothing_is_compiled_after_the_warm_up(tmp_path: Path, recipe_file: Path, recompute: str):
    """Neither for evaluations of other sizes, nor for prompts, nor for the first loss."""
    settings = (
        "precision.compile=true", "precision.dtype=fp32", "train.steps=4", "eval.every_steps=2",
        "eval.windows=5", 'eval.prompts=["The license", "a"]', "eval.prompt_tokens=4",
        f"train.activation_checkpointing={recompute}",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "compiled_run.py", recipe_file, tmp_path / "run",
         *settings],
        env=environment() | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {
        "after_start": 3, "at_the_end": 3, "deterministic": True, "optimize_ddp": False
    }  # fmt: skip
    assert "torch.compile failed" not in done.stderr
    assert "lru_cache" not in done.stderr
    assert "context_fn" not in done.stderr
    assert "step 4  validation" in done.stderr
    pretrain(recipe_file, tmp_path / "eager", False)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "eager"), rel=1e-5)


def test_auto_compiles_on_gpus():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert compiles(PrecisionSettings(), gpu)
    assert not compiles(PrecisionSettings(), cpu)
    for setting in (True, False):
        assert compiles(PrecisionSettings(compile=setting), gpu) == setting
        assert compiles(PrecisionSettings(compile=setting), cpu) == setting
