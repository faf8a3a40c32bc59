"""Models and adapters that were received broken, or made to do harm: one line, and soon."""

import json
import os
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt_cli.core.errors import UserError
from minigpt_cli.data.tokenizer import load_tokenizer
from minigpt_cli.huggingface.adapter import open_model
from minigpt_cli.huggingface.base_model import open_base, stop_token_ids
from minigpt_cli.huggingface.load import load_model
from tests.helpers.adapters import KINDS, peft_adapter
from tests.helpers.models import saved_model

CPU = torch.device("cpu")
LARGE = 10**19
HUGE = 10**400
"""More than a float holds."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, license_dataset: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        shape: saved_model(shape, folder / shape, license_dataset)[1]
        for shape in ("gpt2", "llama", "qwen3")
    }


@pytest.fixture
def model(models: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(models["llama"], tmp_path / "model")
    return tmp_path / "model"


def assert_one_line(directory: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_base(directory)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("shape", "changed"),
    [
        (shape, {name: value})
        for shape, names in {
            "gpt2": ("n_layer", "n_embd", "n_head", "n_inner", "n_positions", "vocab_size"),
            "llama": (
                "num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size",
                "num_key_value_heads", "head_dim", "intermediate_size",
            ),
            "qwen3": ("num_hidden_layers", "head_dim"),
        }.items()
        for name in names
        for value in (10**6, LARGE, HUGE, -1, 0, 1e3, "7", [7], True)
    ],
)  # fmt: skip
def test_sizes_that_are_not_those_of_the_tensors(
    models: dict[str, Path], tmp_path: Path, shape: str, changed: dict[str, Any]
):
    copy = tmp_path / "model"
    shutil.copytree(models[shape], copy)
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | changed))
    assert_one_line(copy, r"config\.json")


@pytest.mark.parametrize(
    "changed",
    [
        {"rms_norm_eps": float("nan")}, {"rms_norm_eps": -1}, {"rms_norm_eps": "x"},
        {"rope_theta": HUGE, "rope_parameters": None}, {"rope_parameters": [1]},
        {"rope_parameters": {"rope_type": "linear", "factor": float("nan")}},
        {"rope_parameters": {"rope_type": "llama3", "factor": "x"}},
        {"rope_parameters": {"rope_type": ["linear"]}},
        {"initializer_range": HUGE}, {"initializer_range": [1]}, {"hidden_act": {}},
        {"model_type": ["llama"]}, {"model_type": "\u001b[2J"}, {"max_position_embeddings": LARGE},
    ],
)  # fmt: skip
def test_values_that_no_model_has(model: Path, changed: dict[str, Any]):
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | changed))
    assert_one_line(model, r"config\.json")


def test_many_positions_cost_nothing(model: Path):
    """Their tables are made as they are needed."""
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 10**9}))
    assert load_model(model, CPU, []).model.config.max_position_embeddings == 10**9


def header(content: Any, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[Any], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


HEADERS = [
    b"", b"1234567", struct.pack("<Q", 10**18) + b"{}", struct.pack("<Q", 2**64 - 1) + b"{}",
    struct.pack("<Q", 100) + b"{}", header(b"[" * 10**6), header(b"{}"), header(b"[1]"),
    header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"0" * 12),
    header({"a": entry([2], 0, 8), "b": entry([2], 100, 108)}, b"0" * 108),
    header({"a": entry([2], 0, 8)}), header({"a": entry([2], 0, 8)}, b"0" * 99),
    header({"a": entry([2**40, 2**40], 0, 8)}, b"0" * 8),
    header({"a": entry([-1], 0, 8)}, b"0" * 8), header({"a": entry([2], 8, 0)}, b"0" * 8),
    header({"a": entry([2], 0, 8, "F99")}, b"0" * 8),
    header({"a\u001b[2J\nb": entry([2], 0, 8)}, b"0" * 8),
    header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', b"0000"),
]  # fmt: skip


@pytest.mark.parametrize("content", HEADERS)
def test_headers_of_safetensors(model: Path, content: bytes):
    (model / "model.safetensors").write_bytes(content)
    assert_one_line(model, r"safetensors|config\.json: num_hidden_layers")


@pytest.mark.parametrize("content", HEADERS)
def test_headers_of_an_adapter(adapter: Path, content: bytes):
    (adapter / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=str(adapter)):
        open_model(adapter, [])


@pytest.mark.parametrize("name", ["..", ".", "", "/etc/passwd", "a/b", "a\u0000b", "x" * 300])
def test_names_of_shards(model: Path, name: str):
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_one_line(model, "is missing|outside the directory|is not a")


def test_files_that_are_none(model: Path):
    for name in ("model.safetensors", "config.json"):
        content = (model / name).read_bytes()
        (model / name).unlink()
        os.mkfifo(model / name)
        with pytest.raises(UserError):
            open_base(model)
        (model / name).unlink()
        (model / name).write_bytes(content)
    open_base(model)


@pytest.mark.parametrize("value", ["x", [[1]], {"a": 1}, 1.5, True, ["x"]])
def test_special_token_ids(model: Path, value: Any):
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"eos_token_id": value}))
    assert_one_line(model, r"config\.json: eos_token_id must be")


@pytest.mark.parametrize(
    "content", ["", "[" * 10**6, "[]", '{"eos_token_id": {"a": 1}}', "\ufeff{}"]
)
def test_generation_settings_that_no_model_has(model: Path, content: str):
    """They only say where a text ends, so a model without them works."""
    (model / "generation_config.json").write_text(content)
    base = open_base(model)
    assert stop_token_ids(base, load_tokenizer(base.tokenizer))


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"]
)
@pytest.mark.parametrize("content", [b"\xff", b"a" * (1 << 25)])
def test_auxiliary_files_that_are_none(model: Path, name: str, content: bytes):
    (model / name).write_bytes(content)
    assert_one_line(model, f"{name}: (can't be read|is larger)")


def test_more_token_ids_than_embeddings(model: Path):
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"]["more"] = 5000
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"ids up to 5,000, but the model has 320 embeddings"):
        load_model(model, CPU, [])


@pytest.fixture
def adapter(model: Path) -> Path:
    peft_adapter(model, model.parent / "adapter", KINDS["plain"])
    return model.parent / "adapter"


@pytest.mark.parametrize(
    "changed",
    [
        {"r": 10**9}, {"r": LARGE}, {"r": -1}, {"r": 4.5}, {"r": "4"}, {"r": True}, {"r": None},
        {"lora_alpha": float("nan")}, {"lora_alpha": float("inf")}, {"lora_alpha": HUGE},
        {"lora_alpha": -1}, {"lora_alpha": []}, {"lora_dropout": 2}, {"lora_dropout": "x"},
        {"lora_dropout": float("nan")}, {"peft_type": ["LORA"]}, {"bias": {}},
        {"init_lora_weights": "x"}, {"base_model_name_or_path": 5},
        {"base_model_name_or_path": "a\nb"}, {"base_model_name_or_path": "a\0b"},
    ],
)  # fmt: skip
def test_settings_of_an_adapter(adapter: Path, changed: dict[str, Any]):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError) as caught:
        open_model(adapter, [])
    assert str(adapter) in str(caught.value)
    assert len(str(caught.value)) < 2000


def test_target_modules_are_not_read(adapter: Path):
    """The tensors say which layers have an adapter; a pattern might take for ever."""
    for target in ("(a+)+$", ["x"], 5, None):
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": target}))
        open_model(adapter, [])


def test_adapter_of_integers(adapter: Path):
    file = adapter / "adapter_model.safetensors"
    save_file({name: each.to(torch.int32) for name, each in load_file(file).items()}, file)
    with pytest.raises(UserError, match="not of floating-point numbers"):
        open_model(adapter, [])
