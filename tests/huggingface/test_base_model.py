"""Models that others trained, as base models: loaded whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from minigpt_cli.core.errors import UserError
from minigpt_cli.generate.engine import generate
from minigpt_cli.generate.sampling import SamplingOptions
from minigpt_cli.huggingface.base_model import load_base, open_base
from minigpt_cli.huggingface.weights import INDEX, WEIGHTS
from minigpt_cli.model.gpt import GPT, copy_values
from tests.helpers.models import SHAPES, saved_model

IDS = torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(1))


def ours_from(directory: Path) -> GPT:
    base = open_base(directory)
    model = GPT(base.config)
    load_base(base, model, copy_values)
    return model.eval()


@torch.no_grad()
def assert_same_model(ours: GPT, theirs: Any) -> None:
    logits = theirs(IDS).logits
    assert logits.std() > 0.5  # so that 1e-4 means something
    torch.testing.assert_close(ours(IDS), logits, rtol=0, atol=1e-4)


def test_logits(theirs: tuple[Any, Path]):
    model, directory = theirs
    assert_same_model(ours_from(directory), model)


def test_greedy_generation(theirs: tuple[Any, Path]):
    model, directory = theirs
    prompt = [10, 200, 31, 5]
    steps = generate(
        ours_from(directory), prompt, SamplingOptions(temperature=0.0), max_new_tokens=50
    )
    tokens = [step[0] for step in steps]
    expected = model.generate(
        torch.tensor([prompt]), max_new_tokens=50, min_new_tokens=50, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert tokens == expected[0, 4:].tolist()


@pytest.mark.parametrize("shape", ["gpt2", "qwen3-tied-biases"])
def test_shards_and_half_precision(tmp_path: Path, license_dataset: Path, shape: str):
    model, directory = saved_model(shape, tmp_path, license_dataset, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_model(ours_from(directory), model)
    model.bfloat16().save_pretrained(directory / "half")
    shutil.copy(directory / "tokenizer.json", directory / "half")
    model = AutoModelForCausalLM.from_pretrained(directory / "half", dtype=torch.float32)
    assert_same_model(ours_from(directory / "half"), model)


def test_one_file_beside_an_old_index(tmp_path: Path, license_dataset: Path):
    theirs, directory = saved_model("llama", tmp_path, license_dataset)
    sharded = tmp_path / "sharded"
    theirs.save_pretrained(sharded, max_shard_size="50KB")
    other = {name: tensor * 1.5 for name, tensor in load_file(directory / WEIGHTS).items()}
    save_file(other, sharded / WEIGHTS, metadata={"format": "pt"})
    assert (sharded / INDEX).exists()
    assert_same_model(ours_from(sharded), AutoModelForCausalLM.from_pretrained(sharded).float())


@pytest.mark.parametrize("shape", ["gpt2", "llama-biases-tied"])
def test_names_without_prefix_and_old_buffers(tmp_path: Path, license_dataset: Path, shape: str):
    """As AutoModel saves it, without a head; GPT-2's first checkpoints hold masks, too."""
    model, directory = saved_model(shape, tmp_path, license_dataset)
    AutoModel.from_pretrained(directory).save_pretrained(directory / "bare")
    file = directory / "bare/model.safetensors"
    tensors = load_file(file)
    assert not any(name.startswith(("transformer.", "model.")) for name in tensors)
    if shape == "gpt2":
        tensors |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 96, 96) for layer in (0, 1)}
        tensors |= {"h.0.attn.masked_bias": torch.tensor(-1e4)}
    else:
        tensors |= {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(tensors, file)
    shutil.copy(directory / "tokenizer.json", directory / "bare")
    assert_same_model(ours_from(directory / "bare"), model)
    assert "ignored: " in open_base(directory / "bare").report


def damaged(directory: Path, to: Path, change: Any) -> Path:
    shutil.copytree(directory, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file(tensors, to / "model.safetensors")
    return to


def test_problems_are_listed(tmp_path: Path, license_dataset: Path):
    _, directory = saved_model("llama", tmp_path / "llama", license_dataset)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = torch.ones(49)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(48)
        tensors["model.layers.1.input_layernorm.weight"] = torch.ones(48, dtype=torch.int32)

    with pytest.raises(UserError) as error:
        open_base(damaged(directory, tmp_path / "bad", change))
    text = str(error.value)
    assert "18 tensors fit" in text
    assert "1 missing: model.layers.1.mlp.up_proj.weight;" in text
    assert "1 unexpected: model.layers.0.self_attn.q_proj.bias;" in text
    assert "model.norm.weight is F32 [49], not [48]" in text
    assert "model.layers.1.input_layernorm.weight is I32 [48], not [48]" in text
    assert "nothing was loaded" in text


def test_heads_for_other_tasks_are_ignored(tmp_path: Path, license_dataset: Path):
    model, directory = saved_model("llama", tmp_path / "llama", license_dataset)
    place = damaged(directory, tmp_path / "more", lambda t: t.update(score=torch.ones(3)))
    assert_same_model(ours_from(place), model)
    assert "1 ignored: score" in open_base(place).report


def test_tied_head_must_equal_the_embeddings(tmp_path: Path, license_dataset: Path):
    model, directory = saved_model("qwen3-tied-biases", tmp_path / "qwen", license_dataset)
    same = damaged(
        directory, tmp_path / "same",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}),
    )  # fmt: skip
    assert_same_model(ours_from(same), model)
    other = damaged(
        directory, tmp_path / "other", lambda t: t.update({"lm_head.weight": torch.ones(320, 48)})
    )
    with pytest.raises(UserError, match=r"lm_head\.weight differs from the embeddings"):
        open_base(other)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"pytorch_model.bin": b"\x80\x04"}, "Pickles (.bin) can run any code when they are read"),
        ({}, "holds no model.safetensors, nor a model.safetensors.index.json"),
        ({"model.safetensors": b"invalid_state"}, "model.safetensors: is not a safetensors file"),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "../secret.safetensors"}}'},
            "names a file outside the directory",
        ),
        (
            {"model.safetensors.index.json": b'{"weight_map": {"a": "1.safetensors"}}'},
            "1.safetensors: is missing",
        ),
        ({"model.safetensors.index.json": b"[]"}, "is not a JSON object"),
        ({"config.json": b"{"}, "config.json: can't be read"),
        ({"config.json": b'{"model_type": "bert"}'}, "model_type bert is not supported"),
    ],
)
def test_unreadable_files(tmp_path: Path, files: dict[str, bytes], message: str):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["llama"]))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        open_base(tmp_path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["no/such/path/here", "./nowhere", "some body/model", ""])
def test_missing_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        open_base(name)
