"""Adapters on disk: what PEFT writes minigpt reads, and the other way round."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.huggingface.adapter import LoadedAdapter, merge, open_adapter, open_model
from minigpt_cli.huggingface.base_model import open_base
from minigpt_cli.huggingface.export import export_adapter, export_model
from minigpt_cli.huggingface.load import load_model
from minigpt_cli.model import lora
from minigpt_cli.model.gpt import GPT
from minigpt_cli.recipe import AdapterSettings
from tests.helpers.adapters import KINDS, peft_adapter, randomize
from tests.helpers.models import saved_model

IDS = torch.randint(0, 320, (2, 40), generator=torch.Generator().manual_seed(1))
CPU = torch.device("cpu")
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
shapes = pytest.mark.parametrize("shape", ["gpt2", "llama", "qwen3"])


@kinds
@shapes
def test_peft_adapter_loads(
    tmp_path: Path, license_dataset: Path, shape: str, kind: AdapterSettings
):
    _, directory = saved_model(shape, tmp_path / "base", license_dataset)
    theirs = peft_adapter(directory, tmp_path / "adapter", kind)
    for path, adapters in ((directory, [tmp_path / "adapter"]), (tmp_path / "adapter", [])):
        ours = load_model(path, CPU, adapters)
        assert ours.adapters[0].shape.dropout == 0.1
        with torch.no_grad():
            logits = theirs(IDS).logits
            torch.testing.assert_close(ours.model(IDS), logits, rtol=0, atol=1e-4)
    bare = load_model(directory, CPU, [])
    assert (bare.model(IDS) - logits).abs().max() > 0.1


@kinds
@shapes
def test_our_adapter_loads_in_peft(
    tmp_path: Path, license_dataset: Path, shape: str, kind: AdapterSettings
):
    _, directory = saved_model(shape, tmp_path / "base", license_dataset)
    base = open_base(directory)
    model = GPT(base.config)
    lora.attach(model, kind)
    adapter = LoadedAdapter("ours", kind, randomize(model))
    export_adapter(base, adapter, tmp_path / "adapter", files={"README.md": "a card"})
    ours = load_model(tmp_path / "adapter", CPU, []).model
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(directory), tmp_path / "adapter"
    ).eval()
    with torch.no_grad():
        logits = ours(IDS)
        torch.testing.assert_close(theirs(IDS).logits, logits, rtol=0, atol=1e-4)
        merged = theirs.merge_and_unload()(IDS).logits
        torch.testing.assert_close(merged, logits, rtol=0, atol=1e-4)
    done = export_model(merge(base, adapter), tmp_path / "merged", files={"README.md": ""})
    assert done.check.difference is not None
    with torch.no_grad():
        alone = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(IDS).logits
        torch.testing.assert_close(alone, logits, rtol=0, atol=1e-4)
        again = load_model(tmp_path / "merged", CPU, []).model(IDS)
        torch.testing.assert_close(again, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize(
    ("shape", "targets", "written"),
    [
        ("llama", ["q_proj", "v_proj"], ["q_proj", "v_proj"]),
        ("gpt2", ["attn.c_proj"], ["attn.c_proj"]),
        ("gpt2", ["c_proj", "c_attn"], ["c_attn", "c_proj"]),
        ("llama", r".*layers\.1\.mlp\.up_proj", ["model.layers.1.mlp.up_proj"]),
    ],
)
def test_target_modules(
    tmp_path: Path, license_dataset: Path, shape: str, targets: Any, written: list[str]
):
    """Also from a pattern, which only PEFT understands: the tensors tell."""
    _, directory = saved_model(shape, tmp_path / "base", license_dataset)
    peft_adapter(directory, tmp_path / "theirs", KINDS["plain"], targets)
    base, (adapter,) = open_model(tmp_path / "theirs", [])
    export_adapter(base, adapter, tmp_path / "ours", files={"README.md": ""})
    settings = json.loads((tmp_path / "ours/adapter_config.json").read_text())
    assert settings["target_modules"] == written
    one, other = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("theirs", "ours"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        found = load_file(folder / "adapter_model.safetensors")
        change(found)
        save_file(found, folder / "adapter_model.safetensors")

    return do


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (settings(peft_type="IA3"), "support adapters with peft_type 'IA3'"),
        (settings(bias="all"), "support adapters with bias 'all'"),
        (
            settings(modules_to_save=["lm_head"]),
            "support adapters with modules_to_save ['lm_head']",
        ),
        (settings(init_lora_weights="pissa"), "init_lora_weights 'pissa', which changes the base"),
        (settings(r=0), "invalid adapter configuration"),
        (settings(rank_pattern={"q_proj": 2}), "rank_pattern {'q_proj': 2}"),
        (settings(r="many"), "invalid adapter configuration"),
        (
            settings(r=5),
            "expected shape [5, 64] for this base",
        ),
        (
            settings(use_dora=True),
            "magnitude_vector: expected shape [48] for",
        ),
        (settings(base_model_name_or_path=None), "names no base"),
        (tensors(lambda t: t.pop(FIRST)), "lora_B"),
        (tensors(lambda t: t.update({FIRST: torch.ones(4, 47)})), "settings, got [4, 47]"),
        (
            tensors(lambda t: t.update({FIRST.replace("layers.0", "layers.7"): torch.ones(4, 48)})),
            "layers.7.self_attn.q_proj.lora_A.weight, but the base has no such layer",
        ),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no such file"),
        (
            lambda folder: (folder / "adapter_model.safetensors").rename(
                folder / "adapter_model.bin"
            ),
            "is a pickle, which minigpt never reads",
        ),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"invalid_state"),
            "is not a safetensors file",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("[]"), "not a JSON object"),
    ],
)
def test_invalid_adapters(
    llama: tuple[Path, Path], tmp_path: Path, change: Callable[[Path], None], message: str
):
    shutil.copytree(llama[1], tmp_path / "adapter")
    change(tmp_path / "adapter")
    with pytest.raises(UserError) as error:
        open_model(tmp_path / "adapter", [])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, license_dataset: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("llama")
    _, directory = saved_model("llama", folder / "base", license_dataset)
    peft_adapter(directory, folder / "adapter", KINDS["plain"])
    return directory, folder / "adapter"


def test_damaged_base(llama: tuple[Path, Path], tmp_path: Path):
    """By the exit code, too: the adapter itself is whole."""
    run = tmp_path / "run"
    checkpoint = run / "checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    (run / "recipe.toml").touch()
    adapter = tmp_path / "adapter"
    shutil.copytree(llama[1], adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(run)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(Damaged, match=r"its base can't be opened: .*no valid checkpoint"):
        open_model(adapter, [])


def test_adapter_of_another_model(llama: tuple[Path, Path], tmp_path: Path, license_dataset: Path):
    _, other = saved_model("qwen3", tmp_path / "other", license_dataset)
    with pytest.raises(UserError, match=r"expected shape \[.*\] for this base .*, got \["):
        open_adapter(llama[1], open_base(other).config)
    with pytest.raises(UserError, match="is an adapter itself"):
        open_model(llama[1], [llama[1]])
    with pytest.raises(UserError, match="no such run"):
        open_model(llama[0], [tmp_path / "nowhere"])
