import tomllib
from pathlib import Path

import pytest

from minigpt_cli.core.errors import UserError
from minigpt_cli.recipe import (
    changed_settings,
    dump_recipe,
    load_recipe,
    parse_recipe,
)

BASE = """
[data]
path = "data/x"
[model]
family = "llama"
hidden_size = 64
num_hidden_layers = 2
num_attention_heads = 4
[train]
steps = 100
global_batch_size = 32
sequence_length = 128
[optimizer]
lr = 3e-4
"""
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


def problems(text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_recipe(text, list(overrides), where="r.toml")
    return str(caught.value)


def test_command_line_beats_recipe_beats_default():
    recipe = parse_recipe(BASE, ["optimizer.lr=1e-3", "precision.dtype=bf16"])
    assert recipe.optimizer.lr == 1e-3
    assert recipe.precision.dtype == "bf16"
    assert recipe.train.steps == 100
    assert recipe.optimizer.clip_norm == 1.0
    origin = recipe.origin
    assert origin["optimizer.lr"] == "command line"
    assert origin["train.steps"] == "recipe"
    assert origin["optimizer.clip_norm"] == "default"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("eval.prompts=['def ', 'a\"b']", ("def ", 'a"b')),
        ("eval.prompts=one", ("one",)),
        ("optimizer.betas=[0.8, 0.9]", (0.8, 0.9)),
        ("optimizer.lr=1", 1.0),
        ("precision.compile=true", True),
    ],
)
def test_overrides_take_toml_values(override: str, expected: object):
    section, key = override.partition("=")[0].split(".")
    recipe = parse_recipe(BASE, [override])
    assert getattr(getattr(recipe, section), key) == expected


def test_all_problems_are_listed():
    text = BASE.replace("steps = 100", "stepz = 100") + "[schedul]\n[eval]\nwindows = 'many'\n"
    message = problems(text, "model.family=lama", "optimizer.betas=[0.9]")
    assert message.startswith("r.toml: 5 problems\n")
    assert len(message.splitlines()) == 6
    assert "r.toml:10: [train] stepz: unknown; did you mean steps?" in message
    assert "r.toml:15: [schedul]: unknown; did you mean schedule?" in message
    assert "r.toml:17: [eval] windows: expected an integer, got 'many'" in message
    assert "--set model.family: expected one of gpt2, llama, qwen3 (did you mean llama?)" in message
    assert "--set optimizer.betas: expected a list of 2" in message


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train.micro_batch_size=5", "not a multiple of micro_batch_size 5"),
        (
            "train.sequence_length=0",
            "sequence_length: expected an integer above 0 and at most 1,000,000,000, got 0",
        ),
        ("model.max_position_embeddings=64", "longer than [model] max_position_embeddings 64"),
        ("schedule.warmup_steps=101", "more than the 100 steps"),
        ("schedule.min_lr_ratio=1.5", "expected a number of at least 0 and at most 1, got 1.5"),
        ("optimizer.lr=-1", "--set optimizer.lr: expected a number above 0, got -1"),
        ("schedule.name=step", "milestones: name = step needs them"),
        ("data.source.kind=files", "needs a path"),
        ("data.source.kind=python-stdlib", "give path or train_vocab"),
        ("guard.spike_sigma=0", "spike_sigma: expected a number above 0"),
        ("guard.spike_window=7", "at least 8 and at most 100,000, got 7"),
        ("guard.rollback_after=0", "rollback_after: expected an integer above 0"),
        ("train.steps=1.5", "expected an integer"),
        ("train.steps=true", "expected an integer"),
        ("train.deterministic=1", "expected true or false"),
        ("precision.compile=1", "expected one of true, false, auto, got 1"),
        ("precision.tf32=true", "[precision] tf32 is for dtype = fp32, not auto"),
        ("lr=1", "--set section.key=value"),
        ("train=3", "--set section.key=value"),
        ("tarin.steps=3", "--set tarin.steps: [tarin]: unknown; did you mean train?"),
        ("model.rope_scaling=3", "expected a table, [model.rope_scaling]"),
        ("optimizer.lr=inf", "lr: expected a finite number above 0, got inf"),
        (
            "optimizer.betas=[0.9, 1.0]",
            "--set optimizer.betas: item 1: expected a number of at least 0",
        ),
        (
            "schedule.milestones=[5, -1]",
            "--set schedule.milestones: item 1: expected an integer of at least 0",
        ),
    ],
)
def test_what_types_cannot_say(override: str, part: str):
    assert part in problems(BASE, override)


def test_a_range_names_the_line():
    text = BASE.replace("lr = 3e-4", "lr = 0.0").replace("steps = 100", "steps = -1")
    assert problems(text).split("\n  ")[1:] == [
        "r.toml:10: [train] steps: expected an integer above 0, got -1",
        "r.toml:14: [optimizer] lr: expected a number above 0, got 0.0",
    ]


def test_a_huge_integer():
    assert parse_recipe(BASE, [f"train.seed={2**63 - 1}"]).train.seed == 2**63 - 1
    for value in (str(2**63), f"-1{'0' * 400}"):
        said = problems(BASE, f"train.seed={value}")
        assert "train.seed: expected an integer that fits into 64 bits, got " in said
        assert len(said) < 200


def test_missing_sections_and_files():
    assert "the section [model] is missing" in problems("[train]\nsteps = 3\n")
    assert "[model] hidden_size is missing" in problems(BASE.replace("hidden_size = 64\n", ""))
    assert "not valid TOML" in problems("[train\n")
    assert "not valid TOML" in problems(BASE + f"\n[log]\nevery_steps = {'9' * 5000}\n")
    assert "not valid TOML" in problems(BASE + f"\n[log]\nevery_steps = {'[' * 100_000}\n")
    for value in ("9" * 5000, "[" * 100_000):
        assert "--set log.every_steps: expected an integer" in problems(
            BASE, f"log.every_steps={value}"
        )
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe("no/such/recipe.toml")


def test_a_name_of_a_shipped_recipe():
    for given in ("tiny", "nowhere/tiny.toml"):
        with pytest.raises(UserError, match=r"minigpt recipes tiny > tiny\.toml"):
            load_recipe(given)


def test_a_byte_order_mark_is_of_no_account(tmp_path: Path):
    file = tmp_path / "tiny.toml"
    file.write_text(BASE, encoding="utf-8-sig")
    assert load_recipe(file) == parse_recipe(BASE, [], name="tiny")


def test_resolved_recipe_reads_back():
    recipe = parse_recipe(
        BASE, ["eval.prompts=['a \"quoted\" # prompt']", "data.source.kind=python-stdlib",
               "data.tokenizer.train_vocab=512"],
        name="x",
    )  # fmt: skip
    text = dump_recipe(recipe)
    again = parse_recipe(text, [], name="x")
    assert again == recipe
    assert again.origin == recipe.origin
    assert changed_settings(recipe, again) == []
    changed = parse_recipe(text, ["optimizer.lr=1e-2"], name="x")
    assert changed_settings(recipe, changed) == [("optimizer.lr", 3e-4, 1e-2)]


@pytest.mark.parametrize("name", ["two\nlines", "a\rb\x00\x85\u2028", "\udc80", "ü # x"])
def test_any_name_can_be_dumped(name: str):
    recipe = parse_recipe(BASE, [], name=name)
    assert parse_recipe(dump_recipe(recipe), [], name=name) == recipe


def test_a_resolved_recipe_is_known_by_its_format():
    recipe = parse_recipe(BASE, ["optimizer.lr=1e-2"], name="x")
    text = dump_recipe(recipe)
    assert tomllib.loads(text)["format"] == "minigpt-resolved-recipe-1"
    without = "\n".join(line for line in text.splitlines() if not line.startswith("format"))
    assert parse_recipe(without, []).origin["optimizer.lr"] == "recipe"  # a person's own file
    old = "# x: the resolved recipe; where each value came from stands behind it\n" + without
    assert parse_recipe(old, []).origin == recipe.origin
    assert "remove this line" in problems('format = "other"\n' + BASE)


def test_the_command_line_replaces_the_alternative():
    recipe = parse_recipe(BASE, ["train.tokens=40_000"])
    assert (recipe.train.steps, recipe.train.tokens, recipe.total_steps) == (None, 40_000, 10)
    again = parse_recipe(dump_recipe(recipe), ["train.steps=7"])
    assert (again.train.steps, again.train.tokens) == (7, None)
    assert again.origin["train.steps"] == "command line"
    assert again.origin["train.tokens"] == "default"
    assert "give the length once" in problems(BASE, "train.tokens=9", "train.steps=9")
    text = BASE + "[data.source]\nkind='python-stdlib'\n[data.tokenizer]\ntrain_vocab=300\n"
    tokenizer = parse_recipe(text, ["data.tokenizer.path=t"]).data.tokenizer
    assert (tokenizer.path, tokenizer.train_vocab) == ("t", None)


def test_tokens_are_rounded_up_to_whole_steps():
    text = BASE.replace("steps = 100", "tokens = 40_000")
    assert parse_recipe(text, []).total_steps == 10  # 32 * 128 = 4096 a step


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads_and_says_how_to_launch_it(path: Path):
    recipe = load_recipe(path)
    command = "pretrain" if recipe.lora is None else "finetune-lora"
    header = [line for line in path.read_text().splitlines()[:8] if line.startswith("#")]
    assert any(f"minigpt {command} recipes/{path.name}" in line for line in header)
    assert tomllib.loads(path.read_text())


def test_there_are_recipes():
    assert RECIPES


def test_names_types_and_ranges_are_listed_at_once():
    text = BASE.replace("lr = 3e-4", "lr = 0.0").replace("steps = 100", 'stepz = 1\nseed = "a"')
    said = problems(text, "train.global_batch_size=0")
    for part in ("stepz: unknown", "seed: expected an integer", "lr: expected a number above 0",
                 "global_batch_size: expected an integer above 0"):  # fmt: skip
        assert part in said
