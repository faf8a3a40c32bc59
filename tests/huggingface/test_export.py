"""Exports: transformers is the oracle."""

import json
import os
import shutil
import sys
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.huggingface.auxiliary_files import AuxiliaryFiles, auxiliary_files_of_checkpoint
from minigpt_cli.huggingface.base_model import BaseModel, load_base, open_base
from minigpt_cli.huggingface.check_export import Mismatch, check_export
from minigpt_cli.huggingface.export import export_model
from minigpt_cli.huggingface.origin import is_trained_here, origin_text, read_origin, verify_export
from minigpt_cli.model.gpt import GPT, copy_values
from tests.helpers.models import saved_model
from tests.helpers.processes import minigpt

IDS = torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(1))


def test_round_trip_is_bit_exact(theirs: tuple[Any, Path], tmp_path: Path):
    """The weights and the auxiliary files."""
    model, directory = theirs
    base = open_base(directory)
    done = export_model(base, tmp_path / "out", files={"README.md": "a card"})
    assert done.check.difference is not None
    assert done.check.difference < 1e-4
    assert verify_export(done.path) == {}
    assert not is_trained_here(done.path)  # so its texts begin with its tokenizer's special tokens
    mine, other = (load_file(place / "model.safetensors") for place in (directory, done.path))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    again = open_base(done.path)
    assert again.config == base.config
    assert again.auxiliary_files.special_token_ids == base.auxiliary_files.special_token_ids
    assert (
        again.auxiliary_files.files["tokenizer_config.json"]
        == (base.auxiliary_files.files["tokenizer_config.json"])
    )
    reloaded = AutoModelForCausalLM.from_pretrained(done.path)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(done.path).chat_template == "{{ messages[0].content }}"
    assert GenerationConfig.from_pretrained(done.path).eos_token_id == 256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("shape", ["gpt2", "qwen3"])
@pytest.mark.parametrize(("dtype", "torch_dtype"), [("bf16", torch.bfloat16), ("fp16", torch.half)])
def test_half_precision_and_several_files(
    tmp_path: Path, license_dataset: Path, shape: str, dtype: str, torch_dtype: torch.dtype
):
    model, directory = saved_model(shape, tmp_path / "in", license_dataset)
    done = export_model(open_base(directory), tmp_path / "out", dtype, files={}, shard_bytes=20_000)
    files = [name for name in done.files if name.endswith(".safetensors")]
    assert len(files) > 3
    index = json.loads((done.path / "model.safetensors.index.json").read_text())
    tensors = {k: v for name in files for k, v in load_file(done.path / name).items()}
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[name], parameter.to(torch_dtype)), name
    for name in files:  # one tensor that is larger than a file may be stands alone
        size = (done.path / name).stat().st_size
        assert size < 22_000 or sum(place == name for place in index["weight_map"].values()) == 1
    reloaded = AutoModelForCausalLM.from_pretrained(done.path)
    assert reloaded.dtype == torch_dtype


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rms_norm_eps": 0.1},
        {"num_key_value_heads": 4},
    ],
)
def test_check_finds_other_logits(tmp_path: Path, license_dataset: Path, change: dict[str, Any]):
    _, directory = saved_model("llama", tmp_path / "in", license_dataset)
    base = open_base(directory)
    out = export_model(base, tmp_path / "out", files={}).path
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(Mismatch):
        check_export(base, out, torch.float32)


def test_check_finds_another_tokenizer(tmp_path: Path, license_dataset: Path):
    _, directory = saved_model("llama", tmp_path / "in", license_dataset)
    base = open_base(directory)
    out = export_model(base, tmp_path / "out", files={}).path
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(Mismatch, match="other tokens"):
        check_export(base, out, torch.float32)


def test_failed_check_leaves_nothing(tmp_path: Path, license_dataset: Path):
    """The weights change between writing and checking."""
    _, directory = saved_model("llama", tmp_path / "in", license_dataset)
    base = open_base(directory)
    reads: Counter[str] = Counter()

    def read(name: str) -> torch.Tensor:
        reads[name] += 1
        return base.read(name) * reads[name]

    with pytest.raises(Mismatch, match="other logits"):
        export_model(replace(base, read=read), tmp_path / "out", files={})
    assert os.listdir(tmp_path) == ["in"]


def test_failed_export_keeps_the_old_one(tmp_path: Path, license_dataset: Path):
    _, directory = saved_model("gpt2", tmp_path / "in", license_dataset)
    base = open_base(directory)
    out = export_model(base, tmp_path / "out", files={"README.md": "first"}).path
    with pytest.raises(UserError, match="already exists"):
        export_model(base, out, files={"README.md": "second"})

    def broken(name: str) -> torch.Tensor:
        if name == "layers.1.mlp.down_proj.weight":
            raise OSError(5, "Input/output error")
        return base.read(name)

    with pytest.raises(OSError, match="Input/output"):
        export_model(replace(base, read=broken), out, files={"README.md": "second"}, replace=True)
    huge = replace(base, read=lambda name: base.read(name) * 1e6)
    with pytest.raises(UserError, match=r"too large for torch\.float16: export it as bf16"):
        export_model(huge, out, "fp16", files={"README.md": "second"}, replace=True)
    assert (out / "README.md").read_text() == "first"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    export_model(base, out, files={"README.md": "third"}, replace=True)
    assert (out / "README.md").read_text() == "third"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("place", ["run/checkpoints/step-00000004", "run/checkpoints/x", "link"])
def test_refused_places(tmp_path: Path, license_dataset: Path, place: str):
    _, directory = saved_model("gpt2", tmp_path / "in", license_dataset)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.toml").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"already exists|within a run's checkpoints"):
        export_model(open_base(directory), tmp_path / place, files={})


def test_names_alone_make_no_run(tmp_path: Path, license_dataset: Path):
    _, directory = saved_model("gpt2", tmp_path / "in", license_dataset)
    out = tmp_path / "checkpoints/of-models/out"
    out.parent.mkdir(parents=True)
    (tmp_path / "manifest.json").write_text("{}")
    export_model(open_base(directory), out, files={})
    assert (out / "model.safetensors").exists()
    moved = tmp_path / "backup/step-00000004"
    moved.mkdir(parents=True)
    (moved / "state.json").write_text("{}")
    with pytest.raises(UserError, match="within a run's checkpoints"):
        export_model(open_base(directory), moved / "out", files={})


def test_final_as_a_link(tmp_path: Path, recipe_file: Path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert minigpt("pretrain", recipe_file, "--out", run, "--set", "train.steps=4").returncode == 0
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    shutil.rmtree(run / "final")
    (run / "final").symlink_to(elsewhere)
    done = minigpt("resume", run, "--set", "train.steps=8")
    assert f"{run}/final holds precious, which no export writes" in done.stderr
    assert os.listdir(elsewhere) == ["precious"]
    (elsewhere / "precious").rename(elsewhere / "README.md")
    done = minigpt("resume", run, "--set", "train.steps=12")
    assert f"exported {run}/final, checked" in done.stderr
    assert not (run / "final").is_symlink()
    assert os.listdir(elsewhere) == ["README.md"]
    assert [name for name in os.listdir(run) if name.startswith(".final")] == []


def test_final_is_of_the_last_step(tmp_path: Path, recipe_file: Path):
    """Also after going back to an older one."""
    run = tmp_path / "run"
    assert minigpt("pretrain", recipe_file, "--out", run).returncode == 0
    before = (run / "final/model.safetensors").read_bytes()
    said = minigpt("resume", run / "checkpoints/step-00000008", "--set", "train.steps=8").stderr
    assert f"exported {run}/final, checked" in said
    assert "2,048 in 8 steps" in (run / "final/README.md").read_text()
    assert (run / "final/model.safetensors").read_bytes() != before


def test_failed_final_is_a_warning(tmp_path: Path, recipe_file: Path):
    """All is trained and saved: exit code 0."""
    run = tmp_path / "run"
    assert minigpt("pretrain", recipe_file, "--out", run, "--set", "train.steps=4").returncode == 0
    shutil.rmtree(run / "final")
    (run / "final").symlink_to(tmp_path / "nowhere/at/all")
    (tmp_path / "nowhere").write_text("a file in the way")
    done = minigpt("resume", run, "--set", "train.steps=8")
    assert done.returncode == 0, done.stderr
    assert f"warning: {run}/final was not made: " in done.stderr
    assert "make it with minigpt export" in done.stderr


@pytest.mark.parametrize(
    "content",
    [
        {"special_tokens": {}, "files": {"../evil.txt": "x"}},
        {"special_tokens": {}, "files": {"tokenizer_config.json": 1}},
        {"special_tokens": {"eos": 1}, "files": {}},
        {"special_tokens": []},
        {"format": 2, "special_tokens": {}, "files": {}},
    ],
)
def test_invalid_auxiliary_files(tmp_path: Path, content: dict[str, Any]):
    (tmp_path / "huggingface.json").write_text(json.dumps(content))
    with pytest.raises(Damaged, match=r"huggingface\.json: not written by this version"):
        auxiliary_files_of_checkpoint(tmp_path)


def test_auxiliary_files_read_back(tmp_path: Path):
    """Also without a format, as the first versions wrote it."""
    files = AuxiliaryFiles({"eos_token_id": [1, 2]}, {"chat_template.jinja": "{{ ü }}"})
    content = json.loads(files.dump())
    assert content.pop("format") == 1
    for text in (files.dump(), json.dumps(content).encode()):
        (tmp_path / "huggingface.json").write_bytes(text)
        assert auxiliary_files_of_checkpoint(tmp_path) == files


def test_origin_reads_back(tmp_path: Path):
    """Also without a format, as the first versions wrote it."""
    assert read_origin(tmp_path) is None
    origin = {"checkpoint": "step-00000012"}
    for text in (origin_text(origin), json.dumps(origin)):
        (tmp_path / "minigpt.json").write_text(text)
        assert read_origin(tmp_path) == origin
    (tmp_path / "minigpt.json").write_text('{"format": 2}')
    with pytest.raises(
        UserError, match=r"minigpt\.json: format 2, but this version of minigpt reads 1"
    ):
        read_origin(tmp_path)


def test_one_tensor_at_a_time(
    tmp_path: Path, license_dataset: Path, monkeypatch: pytest.MonkeyPatch
):
    """While the files are written, at most one of the tensors that were read is alive."""
    _, directory = saved_model("llama", tmp_path / "in", license_dataset)
    base = open_base(directory)
    alive: list[weakref.ref[torch.Tensor]] = []

    def read(name: str) -> torch.Tensor:
        assert sum(each() is not None for each in alive) <= 1
        tensor = base.read(name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setitem(sys.modules, "transformers", None)  # no check, which reads once more
    export_model(replace(base, read=read), tmp_path / "out", files={"README.md": ""})
    assert len(alive) == 21


def logits_of(base: BaseModel) -> torch.Tensor:
    model = GPT(base.config)
    load_base(base, model, copy_values)
    with torch.no_grad():
        return model.eval()(IDS[:, :32])


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_final_loads_in_transformers(tmp_path: Path, recipe_file: Path, family: str):
    """On two ranks, sharded; gathered from their files by one process."""
    run = tmp_path / "run"
    heads = () if family != "gpt2" else ("--set", "model.num_key_value_heads=4")
    done = minigpt(
        "pretrain", recipe_file, "--out", run, "--set", f"model.family={family}", *heads,
        "--set", "distributed.strategy=fsdp", "--nproc", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"exported {run}/final, checked with transformers" in done.stderr
    theirs = AutoModelForCausalLM.from_pretrained(run / "final")
    base = open_base(run)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS[:, :32]).logits, logits_of(base), rtol=0, atol=1e-4)
    card = (run / "final/README.md").read_text()
    assert "3,072 in 12 steps" in card
    assert f'family = "{family}"  # command line' in card
    before = (run / "final/model.safetensors").stat().st_mtime_ns
    again = minigpt("resume", run)
    assert "final exists already" in again.stderr
    assert (run / "final/model.safetensors").stat().st_mtime_ns == before
    out = tmp_path / "out"
    done = minigpt("export", run / "checkpoints/step-00000004", out, "--json")
    assert json.loads(done.stdout)["proven"] is True
    assert "1,024 in 4 steps" in (out / "README.md").read_text()
    assert minigpt("export", run, out).returncode == 2


def test_without_transformers(
    tmp_path: Path, license_dataset: Path, monkeypatch: pytest.MonkeyPatch
):
    _, directory = saved_model("gpt2", tmp_path / "in", license_dataset)
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = export_model(open_base(directory), tmp_path / "out", files={"README.md": ""})
    assert str(done.check) == "not checked: transformers is not installed"
    assert (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("shape", ["gpt2", "llama-biases-tied", "llama-3-angles", "qwen3"])
def test_init_from(shape: str, tmp_path: Path, recipe_file: Path, license_dataset: Path):
    """The recipe names no shape, the data no tokenizer; what came with the model goes out again."""
    model, directory = saved_model(shape, tmp_path / "in", license_dataset)
    text = recipe_file.read_text()
    begin, end = text.index("[model]"), text.index("[train]")
    source = f'[data.source]\nkind = "files"\npath = "{Path(__file__).parent}/*.py"\n'
    file = tmp_path / "recipe.toml"
    file.write_text(
        f'[data]\npath = "{tmp_path}/data"\n{source}[model]\ninit_from = "{directory}"\n'
        + text[end:]
    )
    assert begin < end
    run = tmp_path / "run"
    done = minigpt("pretrain", file, "--out", run, "--set", "optimizer.lr=1e-30",
                   "--set", "precision.dtype=fp32", "--set", "train.steps=4")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert " tensors fit (" in done.stderr
    reloaded = AutoModelForCausalLM.from_pretrained(run / "final")
    with torch.no_grad():
        torch.testing.assert_close(reloaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-4)
    assert AutoTokenizer.from_pretrained(run / "final").chat_template == "{{ messages[0].content }}"
    assert 'family = "' in (run / "recipe.toml").read_text()
    assert "  # base\n" in (run / "recipe.toml").read_text()
    resumed = minigpt("resume", run, "--set", "train.steps=5")
    assert resumed.returncode == 0, resumed.stderr


def test_contradicting_recipe(tmp_path: Path, license_dataset: Path, recipe_file: Path):
    _, directory = saved_model("llama", tmp_path / "in", license_dataset)
    done = minigpt("pretrain", recipe_file, "--out", tmp_path / "run",
                   "--set", f"model.init_from={directory}")  # fmt: skip
    assert done.returncode == 2
    assert "hidden_size = 32 (there: 48)" in done.stderr
    assert "num_hidden_layers" not in done.stderr  # it agrees
    assert not (tmp_path / "run").exists()


def test_data_of_another_tokenizer(tmp_path: Path, license_dataset: Path, recipe_file: Path):
    """The same ids would mean other tokens."""
    _, directory = saved_model("llama", tmp_path / "in", license_dataset)
    settings = json.loads((directory / "config.json").read_text())
    text = recipe_file.read_text()
    begin, end = text.index("[model]"), text.index("[train]")
    assert settings["vocab_size"] == 320  # as that of the recipe's data
    file = tmp_path / "recipe.toml"
    file.write_text(text[:begin] + f'[model]\ninit_from = "{directory}"\n' + text[end:])
    done = minigpt("pretrain", file, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert "its tokenizer is not that of" in done.stderr
