"""Exports: what transformers, and nothing but transformers, makes of them."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.huggingface import export
from minigpt_cli.huggingface.base_model import (
    Base,
    auxiliary_files_of_checkpoint,
    load_base,
    open_base,
)
from minigpt_cli.huggingface.check_export import ExportCheck, Mismatch
from minigpt_cli.huggingface.export import export_model
from minigpt_cli.model.gpt import GPT, copy
from tests.helpers.models import saved_model
from tests.helpers.processes import minigpt

IDS = torch.randint(0, 320, (2, 64), generator=torch.Generator().manual_seed(1))


def test_in_and_out_and_in_again(theirs: tuple[Any, Path], tmp_path: Path):
    """Bit for bit, and with what only the tokenizer's files say."""
    model, directory = theirs
    base = open_base(directory)
    done = export_model(base, tmp_path / "out", files={"README.md": "a card"})
    assert done.proof.difference is not None
    assert done.proof.difference < 1e-4
    mine, other = (load_file(place / "model.safetensors") for place in (directory, done.path))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    again = open_base(done.path)
    assert again.config == base.config
    assert again.auxiliary_files.special_tokens == base.auxiliary_files.special_tokens
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


def test_what_transformers_reads_otherwise_is_no_export(
    tmp_path: Path, license_dataset: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each of these loads without an error, and computes something else."""
    _, directory = saved_model("llama", tmp_path / "in", license_dataset)
    base = open_base(directory)
    place = tmp_path / "place"
    right = export.huggingface_config
    for setting, value in (
        ("rope_theta", 500.0),
        ("rms_norm_eps", 0.1),
        ("num_key_value_heads", 4),
    ):

        def wrong(*given: Any, setting: str = setting, value: Any = value) -> dict[str, Any]:
            settings = right(*given) | {setting: value}
            if setting == "rope_theta":
                settings["rope_parameters"] = {"rope_type": "default", "rope_theta": value}
            return settings

        monkeypatch.setattr(export, "huggingface_config", wrong)
        with pytest.raises(Mismatch):
            export_model(base, place, files={"README.md": ""})
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    monkeypatch.setattr(export, "huggingface_config", right)
    text = json.loads((directory / "tokenizer.json").read_text())
    text["normalizer"] = {"type": "Lowercase"}
    (tmp_path / "other.json").write_text(json.dumps(text))
    other = replace(base, tokenizer=tmp_path / "other.json")
    monkeypatch.setattr(export, "write_tokenizer", lambda _, folder: export_tokenizer(base, folder))
    with pytest.raises(Mismatch, match="other tokens"):
        export_model(other, place, files={"README.md": ""})
    assert not place.exists()


export_tokenizer = export.write_tokenizer


def test_an_error_on_the_way_leaves_what_was_there(tmp_path: Path, license_dataset: Path):
    _, directory = saved_model("gpt2", tmp_path / "in", license_dataset)
    base = open_base(directory)
    out = export_model(base, tmp_path / "out", files={"README.md": "first"}).path
    with pytest.raises(UserError, match="is there already"):
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


def test_what_killed_exports_left_is_cleared_and_what_they_moved_comes_back(
    tmp_path: Path, license_dataset: Path
):
    _, directory = saved_model("gpt2", tmp_path / "in", license_dataset)
    base, out, gone = open_base(directory), tmp_path / "out", 2**22 + 1  # no process has this id
    for name in (f".out-{gone}-abc", f".out-{os.getpid()}-abc", ".out-notes", f".other-{gone}-a"):
        (tmp_path / name).mkdir()
    (tmp_path / f".out-{gone}-def-old").mkdir()
    (tmp_path / f".out-{gone}-def-old/precious").write_text("x")
    with pytest.raises(UserError, match="is there already"):
        export_model(base, out, files={})  # it came back
    assert (out / "precious").read_text() == "x"
    left = {path.name for path in tmp_path.iterdir()} - {"in", "out"}
    assert left == {f".out-{os.getpid()}-abc", ".out-notes", f".other-{gone}-a"}


@pytest.mark.parametrize("place", ["run/checkpoints/step-00000004", "run/checkpoints/x", "link"])
def test_no_export_into_checkpoints_or_through_a_dangling_link(
    tmp_path: Path, license_dataset: Path, place: str
):
    _, directory = saved_model("gpt2", tmp_path / "in", license_dataset)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.toml").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is there already|within a run's checkpoints"):
        export_model(open_base(directory), tmp_path / place, files={})


def test_folders_that_have_such_names_by_chance_are_no_runs(tmp_path: Path, license_dataset: Path):
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


def test_where_final_is_a_link_what_it_leads_to_is_left_alone(tmp_path: Path, recipe_file: Path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for path in (run, elsewhere):
        path.mkdir()
    (elsewhere / "precious").write_text("x")
    (run / "final").symlink_to(elsewhere)
    done = minigpt("pretrain", recipe_file, "--out", run)
    assert f"exported {run}/final, proven" in done.stderr
    assert not (run / "final").is_symlink()
    assert os.listdir(elsewhere) == ["precious"]
    assert [name for name in os.listdir(run) if name.startswith(".final")] == []


def test_final_is_of_the_checkpoint_that_the_run_ended_with(tmp_path: Path, recipe_file: Path):
    """Also after going back to an older one."""
    run = tmp_path / "run"
    assert minigpt("pretrain", recipe_file, "--out", run).returncode == 0
    before = (run / "final/model.safetensors").read_bytes()
    said = minigpt("resume", run / "checkpoints/step-00000008", "--set", "train.steps=8").stderr
    assert f"exported {run}/final, proven" in said
    assert "2,048 in 8 steps" in (run / "final/README.md").read_text()
    assert (run / "final/model.safetensors").read_bytes() != before


def test_a_final_that_cannot_be_made_is_a_warning(tmp_path: Path, recipe_file: Path):
    """All is trained and saved: exit code 0."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "final").symlink_to(tmp_path / "nowhere/at/all")
    (tmp_path / "nowhere").write_text("a file in the way")
    done = minigpt("pretrain", recipe_file, "--out", run, "--set", "train.steps=4")
    assert done.returncode == 0, done.stderr
    assert f"warning: {run}/final was not made: " in done.stderr
    assert "make it with minigpt export" in done.stderr


def test_what_a_checkpoint_carries_leads_nowhere_else(tmp_path: Path):
    for content in (
        {"special_tokens": {}, "files": {"../evil.txt": "x"}},
        {"special_tokens": {}, "files": {"tokenizer_config.json": 1}},
        {"special_tokens": {"eos": 1}, "files": {}},
        {"special_tokens": []},
    ):
        (tmp_path / "huggingface.json").write_text(json.dumps(content))
        with pytest.raises(Damaged, match=r"huggingface\.json: is not what minigpt writes"):
            auxiliary_files_of_checkpoint(tmp_path)


def test_one_tensor_at_a_time(
    tmp_path: Path, license_dataset: Path, monkeypatch: pytest.MonkeyPatch
):
    """While the files are written, no more than one of the tensors that were read is alive."""
    import weakref

    _, directory = saved_model("llama", tmp_path / "in", license_dataset)
    base = open_base(directory)
    alive: list[weakref.ref[torch.Tensor]] = []

    def read(name: str) -> torch.Tensor:
        assert sum(each() is not None for each in alive) <= 1
        tensor = base.read(name)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(export, "check_export", lambda *_: ExportCheck(None, "not here"))
    export_model(replace(base, read=read), tmp_path / "out", files={"README.md": ""})
    assert len(alive) == 21


def logits_of(base: Base) -> torch.Tensor:
    model = GPT(base.config)
    load_base(base, model, copy)
    with torch.no_grad():
        return model.eval()(IDS[:, :32])


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_a_run_ends_with_a_directory_for_transformers(
    tmp_path: Path, recipe_file: Path, family: str
):
    """On two ranks, sharded; gathered from their files by one process."""
    run = tmp_path / "run"
    heads = () if family != "gpt2" else ("--set", "model.num_key_value_heads=4")
    done = minigpt(
        "pretrain", recipe_file, "--out", run, "--set", f"model.family={family}", *heads,
        "--set", "distributed.strategy=fsdp", "--nproc", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"exported {run}/final, proven by transformers" in done.stderr
    theirs = AutoModelForCausalLM.from_pretrained(run / "final")
    base = open_base(run)
    with torch.no_grad():
        torch.testing.assert_close(theirs(IDS[:, :32]).logits, logits_of(base), rtol=0, atol=1e-4)
    card = (run / "final/README.md").read_text()
    assert "3,072 in 12 steps" in card
    assert f'family = "{family}"  # command line' in card
    before = (run / "final/model.safetensors").stat().st_mtime_ns
    again = minigpt("resume", run)
    assert "final is there" in again.stderr
    assert (run / "final/model.safetensors").stat().st_mtime_ns == before
    out = tmp_path / "out"
    done = minigpt("export", run / "checkpoints/step-00000004", out, "--json")
    assert json.loads(done.stdout)["proven"] is True
    assert "1,024 in 4 steps" in (out / "README.md").read_text()
    assert minigpt("export", run, out).returncode == 2


def test_without_transformers_it_says_that_nothing_was_proven(
    tmp_path: Path, license_dataset: Path, monkeypatch: pytest.MonkeyPatch
):
    _, directory = saved_model("gpt2", tmp_path / "in", license_dataset)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    done = export_model(open_base(directory), tmp_path / "out", files={"README.md": ""})
    assert str(done.proof) == "not proven: transformers is not installed"
    assert (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("shape", ["gpt2", "llama-biases-tied", "llama-3-angles", "qwen3"])
def test_a_run_goes_on_from_what_was_trained_elsewhere(
    shape: str, tmp_path: Path, recipe_file: Path, license_dataset: Path
):
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


def test_a_recipe_that_says_otherwise_is_refused(
    tmp_path: Path, license_dataset: Path, recipe_file: Path
):
    _, directory = saved_model("llama", tmp_path / "in", license_dataset)
    done = minigpt("pretrain", recipe_file, "--out", tmp_path / "run",
                   "--set", f"model.init_from={directory}")  # fmt: skip
    assert done.returncode == 2
    assert "hidden_size = 32 (there: 48)" in done.stderr
    assert "num_hidden_layers" not in done.stderr  # it agrees
    assert not (tmp_path / "run").exists()


def test_data_of_another_tokenizer_is_refused(
    tmp_path: Path, license_dataset: Path, recipe_file: Path
):
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
