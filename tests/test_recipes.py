"""Every shipped recipe passes plan and a dry run, with a small file as data and a small model."""

import json
from pathlib import Path
from typing import Any

import pytest

from minigpt_cli.recipe import load_recipe
from tests.helpers.models import saved_model
from tests.helpers.processes import ROOT, fork

RECIPES = sorted((ROOT / "recipes").glob("*.toml"), key=lambda file: file.stem)
FAMILIES = {"HuggingFaceTB/SmolLM2-135M": "llama", "Qwen/Qwen3-0.6B-Base": "qwen3",
            "runs/shakespeare": "llama"}  # fmt: skip
SMALL = {
    "train.steps": 2, "train.global_batch_size": 4, "train.micro_batch_size": 2,
    "train.sequence_length": 48, "schedule.warmup_steps": 1, "precision.compile": "false",
    "eval.windows": 2, "eval.prompt_tokens": 2,
}  # fmt: skip
NARROW = {
    "model.num_hidden_layers": 1, "model.hidden_size": 16, "model.num_attention_heads": 2,
    "model.max_position_embeddings": 48, "model.vocab_size": 384,
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.txt").write_text((ROOT / "LICENSE").read_text())
    chats = [
        {"messages": [{"role": "user", "content": f"{i}?"},
                      {"role": "assistant", "content": f"{i}."}]}
        for i in range(40)
    ]  # fmt: skip
    (folder / "chats.jsonl").write_text("".join(json.dumps(each) + "\n" for each in chats))
    return folder


def shrunk(file: Path, texts: Path, base: Path, data: Path) -> list[str]:
    """The overrides that make a recipe's run a matter of a second."""
    recipe = load_recipe(file)
    changed = dict(SMALL)
    source = recipe.data.source
    assert source is not None
    changed["data.path"] = data
    changed["data.source.val_fraction"] = 0.1
    if source.format == "instructions":
        changed |= {"data.source.kind": "jsonl", "data.source.path": texts / "chats.jsonl"}
        changed["train.sequence_length"] = 96  # the markers of a template are many tokens here
    else:
        changed |= {"data.source.kind": "files", "data.source.path": texts / "text.txt"}
    if recipe.base is None:
        changed |= NARROW | {"data.tokenizer.train_vocab": 320}
        if recipe.model.family != "gpt2":
            changed |= {"model.num_key_value_heads": 1, "model.head_dim": 8}
            changed["model.intermediate_size"] = 32
    else:
        changed["model.init_from" if recipe.lora is None else "lora.base"] = base
    return [f"--set={name}={value}" for name, value in changed.items()]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_small(file: Path, texts: Path, tmp_path: Path, license_dataset: Path):
    recipe = load_recipe(file)
    base = tmp_path / "base"
    if recipe.base is not None:
        saved_model(FAMILIES[recipe.base], base, license_dataset)
    overrides = shrunk(file, texts, base, tmp_path / "data")
    command = "pretrain" if recipe.lora is None else "finetune-lora"

    def result_of(*arguments: object) -> dict[str, Any]:
        output = tmp_path / "output"
        output.unlink(missing_ok=True)
        log = tmp_path / "log"
        # In the checkout, for the files that recipes name.
        process = fork(log, *arguments, *overrides, "--json", output=output, cwd=ROOT)
        assert process.wait() == 0, log.read_text()
        found: dict[str, Any] = json.loads(output.read_text())
        return found

    assert result_of("plan", file)["steps"] == 2
    assert result_of(command, file, "--dry-run")["loss"] > 0
