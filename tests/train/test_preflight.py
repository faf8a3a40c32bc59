"""Checks before the first step: memory, directories, the loss."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from minigpt_cli.core.errors import UserError
from minigpt_cli.data.dataset import split_in_memory
from minigpt_cli.data.packing import pack
from minigpt_cli.data.sequences import open_data
from minigpt_cli.distributed.world import World
from minigpt_cli.huggingface.base_model import open_base
from minigpt_cli.recipe import Recipe, load_recipe
from minigpt_cli.train.base_loss import base_loss
from minigpt_cli.train.preflight import (
    check_loss,
    check_memory,
    compare_with_base,
    compare_with_guess,
)
from minigpt_cli.train.start import start_run
from minigpt_cli.train.start_checks import check_writable
from tests.helpers.models import SHAPES, saved_model
from tests.helpers.processes import fork
from tests.helpers.ranks import free_port
from tests.helpers.steps import CPU, everything, tiny_context

MakeRecipe = Callable[..., Recipe]


@pytest.mark.parametrize(
    ("loss", "warns"),
    [(4.2, False), (4.6, False), (4.7, True), (3.7, True), (math.nan, True), (math.inf, True)],
)
def test_a_new_model_guesses(loss: float, warns: bool):
    found = compare_with_guess(loss, 67, 67)
    assert found.expected == pytest.approx(4.2047, abs=1e-4)
    assert (found.warning is not None) == warns
    assert found.warning is None or "model.initializer_range" in found.warning


def test_padding_takes_part_in_the_first_guess():
    """A tokenizer of characters: 65 of them, and 63 rows of padding; ln(65) = 4.17."""
    found = compare_with_guess(math.log(128), 65, 128)  # 16% above
    assert (found.expected, found.warning) == (math.log(65), None)
    assert compare_with_guess(3.7, 65, 128).warning is not None
    assert compare_with_guess(5.4, 65, 128).warning is not None


@pytest.mark.parametrize(
    ("loss", "own", "part"),
    [
        (2.0, 2.1, None),
        (2.0, 2.3, "precision.dtype"),
        (math.nan, 2.0, "precision.dtype"),
        (0.02, 0.05, None),  # both are nothing
        (5.5, 5.5, "the right one"),
        (2.0, None, None),
        (5.5, None, "the right one"),
        (math.nan, None, "the right one"),
    ],
)
def test_a_base_is_as_good_as_it_was(loss: float, own: float | None, part: str | None):
    warning = compare_with_base(loss, own, 320, "8 validation sequences").warning  # ln(320) = 5.768
    assert (warning is not None) == (part is not None)
    assert part is None or part in str(warning)


def their_loss(model: torch.nn.Module, tokens: NDArray[np.int64], mask: NDArray[np.bool_]) -> float:
    """The sum of transformers' token losses in one text."""
    logits = model(torch.from_numpy(tokens)[None]).logits[0, :-1]
    losses = F.cross_entropy(logits, torch.from_numpy(tokens)[1:], reduction="none")
    return float(losses[torch.from_numpy(mask)[1:]].sum())


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_the_loss_of_a_base_is_transformers(shape: str, tmp_path: Path, license_dataset: Path):
    """Of packed examples too, each by itself."""
    model, folder = saved_model(shape, tmp_path / "base", license_dataset)
    rng = np.random.default_rng(0)
    lengths = [7, 12, 33, 5, 20, 9]
    tokens = rng.integers(0, 320, sum(lengths))
    mask = rng.random(len(tokens)) < 0.5
    offsets = np.cumsum([0, *lengths])
    mask[offsets[:-1]] = False
    mask[offsets[:-1] + 1] = True
    split = split_in_memory(tokens, vocab_size=320, eos_id=256, loss_mask=mask, offsets=offsets)
    packed = pack(split, 32, seed=0)
    assert packed.num_sequences < len(lengths)
    whole = sum(their_loss(model, tokens[a:b], mask[a:b]) for a, b in zip(offsets, offsets[1:]))  # noqa: B905, RUF007
    ours = base_loss(open_base(folder), packed.gather(np.arange(packed.num_sequences)), CPU)
    assert ours == pytest.approx(whole / mask.sum(), rel=1e-5)


def test_checks_change_nothing(make_recipe: MakeRecipe, tmp_path: Path):
    """No weight, moment, gradient, random number or mode."""
    recipe = make_recipe("model.dropout=0.1", "optimizer.name=muon", "precision.dtype=bf16")
    run, _ = start_run(recipe, tmp_path / "run")
    before, state = everything(run.context), torch.get_rng_state()
    found = check_loss(recipe, run.context, open_data(recipe), None)
    assert found.warning is None
    assert found.loss == pytest.approx(math.log(384), rel=0.02)  # with the padding
    assert found.expected == math.log(320)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(run.context), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert run.context.model.training
    assert all(p.grad is None for p in run.context.model.parameters())
    run.resources.close()


def test_a_start_warns(make_recipe: MakeRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for deviation, warns in (("0.02", False), ("2", True)):
        out = tmp_path / deviation
        start_run(make_recipe(f"model.initializer_range={deviation}"), out)[0].resources.close()
        said = capsys.readouterr().err
        assert "before the first step: loss " in said
        assert ("Look at model.initializer_range" in said) == warns
        assert not list(out.rglob(".preflight-*"))


def test_a_start_from_a_base(
    tmp_path: Path, license_dataset: Path, capsys: pytest.CaptureFixture[str]
):
    """A random model is no base, which only its own loss tells."""
    _, base = saved_model("llama", tmp_path / "base", license_dataset)
    file = tmp_path / "more.toml"
    file.write_text(
        f'data.path = "{license_dataset}"\nmodel.init_from = "{base}"\noptimizer.lr = 1e-3\n'
        "train = {steps = 2, global_batch_size = 2, sequence_length = 32}\n"
    )
    start_run(load_recipe(file), tmp_path / "run")[0].resources.close()
    said = capsys.readouterr().err
    assert "Look at the base (is it trained, and the right one?)" in said
    numbers = said.split("before the first step: loss ")[1].split(" (the base's own: ")
    assert float(numbers[0]) == pytest.approx(float(numbers[1].split(")")[0]), rel=0.01)


def test_memory(make_recipe: MakeRecipe, capsys: pytest.CaptureFixture[str]):
    context = replace(tiny_context(), micro_batch_size=4)
    recipe = make_recipe()
    assert check_memory(recipe, context, None).free is None
    fits = check_memory(recipe, context, 10**9)
    state = sum(t.numel() * t.element_size() for t in everything(context))
    assert state + 1e8 < fits.needed < state + 1.2e8  # of the process
    assert capsys.readouterr().err == ""
    short = check_memory(recipe, context, fits.needed - 1)
    assert short.warning is not None
    said = capsys.readouterr().err
    assert "train.micro_batch_size" in said
    assert "checkpoint.asynchronous=false" in said
    saves_at_once = make_recipe("checkpoint.asynchronous=false")
    assert check_memory(saves_at_once, context, 10**9).needed == fits.needed - state


def test_a_directory_without_new_files():
    with pytest.raises(UserError, match=r"/proc: can't be written to: .*choose another --out"):
        check_writable(Path("/proc"), World(rank=0, size=1, device=CPU))


def test_two_machines_with_different_directories(tmp_path: Path, recipe_file: Path):
    """A relative --out in two working directories: no checkpoint would ever be whole."""
    port = str(free_port())
    ranks = []
    for rank in ("0", "1"):
        folder = tmp_path / rank
        folder.mkdir()
        variables = {
            "RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        arguments = ("pretrain", recipe_file, "--out", "run")
        ranks.append(fork(folder / "log", *arguments, **variables))
    assert [each.wait() for each in ranks] == [2, 2]
    said = ranks[0].said + ranks[1].said
    assert "minigpt: rank 1 doesn't see what rank 0 writes to run, and no checkpoint" in said
    assert said.count("minigpt: ") == 1
    assert not list(tmp_path.rglob(".preflight-*"))


def test_one_machine_with_one_directory(tmp_path: Path, recipe_file: Path):
    log = tmp_path / "log"
    code = fork(log, "pretrain", recipe_file, "--out", "run", "--set", "train.steps=3").wait()
    assert code == 0, log.read_text()
    assert "warning" not in log.read_text()
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])["step"] == 1
