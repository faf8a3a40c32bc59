"""``minigpt plan``: its numbers against those of real models and runs, its advice, its form."""

import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from minigpt_cli.analysis.measure_steps import (
    candidate_sizes,
    fastest,
    measure_steps,
    measured_duration,
)
from minigpt_cli.analysis.plan import Plan, make_plan
from minigpt_cli.analysis.plan_advice import find_advice
from minigpt_cli.analysis.plan_report import plan_as_text, schedule_picture
from minigpt_cli.analysis.planned_devices import PlannedDevices
from minigpt_cli.checkpoint.tensors import bytes_of, tensors_of
from minigpt_cli.data.sequences import open_data
from minigpt_cli.distributed.world import World
from minigpt_cli.model.config import with_vocabulary
from minigpt_cli.model.cost import PEAK_FLOPS
from minigpt_cli.recipe import Recipe, load_recipe
from minigpt_cli.train.trainer import build_context, count_parameters
from tests.helpers.commands import finished, refused
from tests.helpers.processes import ROOT, fork

CPU = PlannedDevices("cpu", 1, "a CPU", 10**10, None, "fp32")
LLAMA_7B = (
    "model.hidden_size=4096", "model.num_hidden_layers=32", "model.num_attention_heads=32",
    "model.num_key_value_heads=32", "model.intermediate_size=11008", "model.vocab_size=32000",
    "train.global_batch_size=512", "train.sequence_length=4096", "train.micro_batch_size=1",
)  # fmt: skip


def gpus(count: int, memory: int | None = 80 * 10**9) -> PlannedDevices:
    return PlannedDevices("cuda", count, "H100", memory, PEAK_FLOPS["H100"], "bf16")


def test_numbers_are_those_of_the_run(make_recipe: Callable[..., Recipe]):
    recipe = make_recipe("optimizer.name=muon")
    plan = make_plan(recipe, CPU)
    data = open_data(recipe)
    padded = with_vocabulary(recipe, data.vocab_size)  # as a start does
    context = build_context(padded, data.vocab_size, World(0, 1, torch.device("cpu")))
    assert plan.model is not None
    assert plan.model.parameters == sum(plan.model.parts.values())
    assert (plan.model.parameters,) * 2 == count_parameters(context.model)
    assert (plan.data.vocab_size, plan.model.vocab_size) == (320, 384)
    assert plan.data.train_sequences == data.train.num_sequences
    assert plan.data.val_sequences == data.val.num_sequences
    assert plan.tokens == 12 * 8 * 32
    assert plan.epochs == pytest.approx(12 * 8 / data.train.num_sequences)
    assert (plan.micro_batch_size, plan.accumulation) == (4, 2)
    saved = bytes_of(tensors_of(context.model, context.optimizers))
    counters = 4 * len(context.optimizers[1].state)  # AdamW's steps
    assert plan.model.checkpoint_bytes == saved - counters
    assert plan.model.checkpoints_at_once == 100 + 1 + 1
    assert max(rate for _, rate in plan.schedule) == recipe.optimizer.lr


def test_adapters_on_a_base_that_is_here(make_recipe: Callable[..., Recipe], tmp_path: Path):
    """Its config.json is enough. The count is PEFT's."""
    import peft

    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, max_position_embeddings=64,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    recipe = make_recipe("lora.base=" + str(tmp_path), "lora.rank=4")
    plan = make_plan(dataclasses.replace(recipe, model=type(recipe.model)()), CPU)
    with torch.device("meta"):
        model = peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_config(config),
            peft.LoraConfig(r=4, target_modules="all-linear"),
        )
    trained, whole = model.get_nb_trainable_parameters()
    assert plan.model is not None
    assert plan.model.trained_parameters == trained
    assert plan.model.parameters == whole
    (single,) = plan.model.strategies
    assert single.memory.gradients == 4 * trained
    assert single.memory.parameters == 4 * whole


def test_a_base_that_is_not_here(make_recipe: Callable[..., Recipe]):
    recipe = make_recipe("model.init_from=nobody/nothing-of-this-name")
    plan = make_plan(recipe, gpus(8))
    assert plan.model is None
    assert "nobody/nothing-of-this-name is not on this machine" in str(plan.model_unknown)
    text = plan_as_text(plan, recipe, find_advice(plan, recipe), [], 80)
    assert "not known: the base model" in text
    assert "12 of 8 x 32 tokens" in text


def test_strategies_of_a_7b_model(make_recipe: Callable[..., Recipe]):
    """The figures of docs/scale.md; a model of 6.7 billion doesn't fit unsharded."""
    recipe = make_recipe(*LLAMA_7B)
    plan = make_plan(recipe, gpus(64))
    assert plan.model is not None
    assert plan.model.parameters == 6_738_415_616
    found = {each.strategy: each for each in plan.model.strategies}
    peaks = {name: round(each.needed / 1e9, 1) for name, each in found.items()}
    assert peaks == {"ddp": 147.0, "zero2": 39.7, "fsdp": 26.8, "hsdp": 38.6}
    assert [name for name, each in found.items() if each.fits] == ["zero2", "fsdp", "hsdp"]
    assert [name for name, each in found.items() if each.is_chosen] == ["fsdp"]
    ddp = find_advice(make_plan(make_recipe(*LLAMA_7B, "distributed.strategy=ddp"), gpus(64)),
                      make_recipe(*LLAMA_7B, "distributed.strategy=ddp"))  # fmt: skip
    assert any("distributed.strategy=zero2" in line for line in ddp)


def test_duration_by_mfu(make_recipe: Callable[..., Recipe]):
    plan = make_plan(make_recipe(*LLAMA_7B), gpus(64), mfu=0.5)
    assert plan.model is not None
    assert plan.duration is not None
    expected = plan.tokens * plan.model.flops_per_token / (64 * 0.5 * 989e12)
    assert plan.duration.seconds == pytest.approx(expected)
    assert make_plan(make_recipe(), CPU).duration is None


@pytest.mark.parametrize(
    ("setting", "overrides", "count"),
    [
        ("global_batch_size 8 can't be divided among 3 ranks", (), 3),
        ("lower train.steps", ("train.steps=100000",), 1),
        ("train.tokens=", ("train.tokens=1000",), 1),
        ("model.hidden_size", ("train.steps=100000",), 1),
        ("schedule.warmup_steps 9", ("schedule.warmup_steps=9",), 1),
        ("lower eval.windows", ("eval.windows=1000000",), 1),
        ("higher eval.windows", (), 1),
        ("eval.every_steps 50 is more", ("eval.every_steps=50",), 1),
        ("checkpoint.keep_last", ("checkpoint.keep_last=1000000000",), 1),
        ("train.global_batch_size 100,000", ("train.global_batch_size=100000",), 1),
    ],
)
def test_advice_names_the_setting(
    make_recipe: Callable[..., Recipe], setting: str, overrides: tuple[str, ...], count: int
):
    recipe = make_recipe(*overrides)
    advice = find_advice(make_plan(recipe, gpus(count)), recipe)
    assert any(setting in line for line in advice), advice


def test_no_advice_where_all_is_well(make_recipe: Callable[..., Recipe]):
    recipe = make_recipe("data.path=nowhere", "model.vocab_size=300", "train.steps=2000",
                         "eval.windows=400", "checkpoint.keep_last=2")  # fmt: skip
    assert find_advice(make_plan(recipe, gpus(1)), recipe) == []


def test_without_a_dataset(make_recipe: Callable[..., Recipe]):
    recipe = make_recipe("data.path=nowhere")
    plan = make_plan(recipe, CPU)
    assert plan.epochs is None
    assert plan.data.vocab_source == "assumed"
    assert any("model.vocab_size" in line for line in find_advice(plan, recipe))
    given = make_plan(make_recipe("data.path=nowhere", "model.vocab_size=777"), CPU)
    assert (given.data.vocab_size, given.data.vocab_source) == (777, "model.vocab_size")


def test_measuring(make_recipe: Callable[..., Recipe]):
    recipe = make_recipe()
    plan = make_plan(recipe, CPU)
    sizes = measure_steps(recipe, plan)
    assert [each.micro_batch_size for each in sizes] == [1, 2, 4, 8]
    best = fastest(sizes)
    assert best is not None
    assert best.tokens_per_second == max(each.tokens_per_second or 0 for each in sizes)
    duration = measured_duration(plan, sizes)
    assert duration is not None
    assert duration.tokens_per_second == pytest.approx(plan.tokens / duration.seconds)
    small = dataclasses.replace(plan, devices=dataclasses.replace(CPU, memory=1))
    assert {each.skipped for each in measure_steps(recipe, small)} == {"predicted not to fit"}


def test_sizes_to_try():
    assert candidate_sizes(8, 4) == [1, 2, 4, 8]
    assert candidate_sizes(12, 12) == [1, 2, 3, 4, 6, 12]
    assert candidate_sizes(512, 1) == [1, 16, 32, 64, 128, 256, 512]
    for batch in (1, 7, 30, 96):
        assert all(batch % size == 0 for size in candidate_sizes(batch, 1))
    assert candidate_sizes(1, 4) == [1]  # 8 GPUs: a rank has fewer sequences than the recipe's own
    assert candidate_sizes(6, 4) == [1, 2, 3, 6]


def test_the_picture_and_its_table(
    make_recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
):
    plan = make_plan(make_recipe(), CPU)
    for width in (20, 80, 200):
        lines = schedule_picture(plan, width).splitlines()
        assert len(lines) == 15
        assert max(map(len, lines)) == max(40, min(width, 100))
    monkeypatch.setitem(sys.modules, "plotext", None)
    table = schedule_picture(plan, 80).splitlines()
    assert table[0].split() == ["step", "optimizer.lr"]
    assert table[-1].split()[0] == "12"
    one = dataclasses.replace(plan, schedule=[(1, 1e-3)])
    assert schedule_picture(one, 80).splitlines()[-1].split() == ["1", "0.001"]


def test_the_command(recipe_file: Path, tmp_path: Path):
    before = sorted(tmp_path.iterdir())
    found = json.loads(finished("plan", recipe_file, "--gpus", 4, "--gpu-memory", "80GB",
                                "--gpu", "H100", "--json", cwd=tmp_path))  # fmt: skip
    assert sorted(tmp_path.iterdir()) == before
    assert found["devices"]["memory"] == 80 * 10**9
    assert [each["strategy"] for each in found["model"]["strategies"]] == ["ddp", "zero2", "fsdp"]
    assert found["duration"]["mfu"] == 0.4
    assert math.isfinite(found["duration"]["seconds"])
    assert found["measured"] == []
    for columns in ("80", "200"):
        output = tmp_path / f"output-{columns}"
        arguments = ("plan", recipe_file, "--gpus", 16, "--gpu-memory", "24GiB")
        assert fork(tmp_path / "log", *arguments, output=output, COLUMNS=columns).wait() == 0
        lines = output.read_text().splitlines()
        assert max(map(len, lines)) <= int(columns)
        assert "Memory per device" in lines


@pytest.mark.parametrize(
    ("part", "arguments"),
    [
        ("--gpu-memory much: expected a size such as 80GB", ("--gpu-memory", "much")),
        ("--gpu-memory 80: expected a size", ("--gpu-memory", "80")),
        ("--gpu H1: not a known GPU; these are: GB200", ("--gpu", "H1")),
        ("--measure and --mfu can't be combined", ("--measure", "--mfu", "0.3")),
        ("--mfu", ("--mfu", "40")),
        ("warmup_steps 100 is more than the 12 steps", ("--set", "schedule.warmup_steps=100")),
    ],
)
def test_bad_input(recipe_file: Path, part: str, arguments: tuple[str, ...]):
    refused(2, part, "plan", recipe_file, *arguments)


def test_plans_are_plain_values(make_recipe: Callable[..., Recipe]):
    plan: Plan = make_plan(make_recipe(), CPU)
    assert json.loads(json.dumps(dataclasses.asdict(plan)))["steps"] == 12


def test_the_way_to_fit(make_recipe: Callable[..., Recipe]):
    """The least change that is enough: nothing, a part recomputed, all recomputed."""
    recipe = make_recipe("model.num_hidden_layers=8", "train.micro_batch_size=8")
    model = make_plan(recipe, gpus(1)).model
    assert model is not None
    (single,) = model.strategies
    sizes = (single.needed, single.needed_selective, single.needed_recomputing)
    assert sizes[0] > sizes[1] > sizes[2]
    verdicts = ("fits", "select.", "recomp.", "too large")
    advice = (None, "=selective", "=true,", "=true (not enough alone)")
    for least, verdict, way in zip((*sizes, 0), verdicts, advice, strict=True):
        plan = make_plan(recipe, gpus(1, int(least / 0.9) + 10))
        found = find_advice(plan, recipe)
        said = plan_as_text(plan, recipe, found, [], 80)
        assert f" {verdict}\n" in said
        told = [line for line in found if "single doesn't fit" in line]
        assert bool(told) == (way is not None)
        assert way is None or f"set train.activation_checkpointing{way}" in told[0]


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda f: f.stem)
def test_shipped_recipes(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without data, network and base model, in 80 columns."""
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(file)
    plan = make_plan(recipe, gpus(8))
    assert (plan.model is None) == (recipe.base is not None)
    text = plan_as_text(plan, recipe, find_advice(plan, recipe), [], 80)
    assert max(map(len, text.splitlines())) <= 80
