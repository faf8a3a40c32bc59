"""What commit 93d8a84 made still works: the samples in tests/data/old, see its README."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.helpers.processes import minigpt
from tests.helpers.runs import BY_CLOCK

OLD = Path(__file__).parent / "data/old"
EVALUATIONS = json.loads((OLD / "expected/evaluations.json").read_text())
CLOSE = {"rtol": 0, "atol": 1e-5}  # the last bits depend on the processor


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # they were made on a CPU
    return shutil.copytree(OLD, tmp_path / "samples")


def run(folder: Path, line: str) -> dict[str, Any]:
    """Run ``minigpt LINE`` in the folder and return its JSON output."""
    done = minigpt(*line.split(), "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def metrics(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: line[key] for key in line if key not in BY_CLOCK} for line in lines]


def assert_same_metrics(file: Path, expected: Path) -> None:
    found, wanted = metrics(file), metrics(expected)
    assert [line["step"] for line in found] == [line["step"] for line in wanted]
    assert found[-1]["step"] == 30
    for line, other in zip(found, wanted, strict=True):
        # A perplexity and bits per byte are multiples of what the loss is off by.
        assert line == pytest.approx(other, abs=1e-5, rel=1e-5)


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_run_is_resumed(samples: Path, name: str) -> None:
    directory = samples / "runs" / name
    run(samples, f"resume runs/{name}")
    expected = load_file(samples / f"expected/{name}.safetensors")
    assert_same_weights(load_file(directory / "final/model.safetensors"), expected)
    loaded = AutoModelForCausalLM.from_pretrained(directory / "final").state_dict()
    assert_same_weights({key: loaded[key] for key in expected}, expected)
    assert loaded["lm_head.weight"].shape[0] == 300  # the tokenizer's size, which isn't padded
    assert_same_metrics(directory / "metrics.jsonl", samples / f"expected/{name}.jsonl")
    assert run(samples, f"verify runs/{name}")["valid"]


def test_adapter_is_resumed(samples: Path) -> None:
    run(samples, "resume runs/lora --set lora.base=runs/base")
    expected = load_file(samples / "expected/lora.safetensors")
    final = samples / "runs/lora/final"
    assert_same_weights(load_file(final / "adapter_model.safetensors"), expected)
    assert_same_metrics(samples / "runs/lora/metrics.jsonl", samples / "expected/lora.jsonl")
    base = AutoModelForCausalLM.from_pretrained(samples / "runs/base/final")
    loaded = PeftModel.from_pretrained(base, final).state_dict()
    assert_same_weights(
        {key: loaded[key.replace(".weight", ".default.weight")] for key in expected}, expected
    )


def test_dataset_and_recipe_give_the_same_run(samples: Path) -> None:
    # Without it the vocabulary of a new run would be padded.
    run(samples, "pretrain adamw.toml --out runs/again --set model.vocab_size=300")
    assert_same_metrics(samples / "runs/again/metrics.jsonl", samples / "expected/adamw.jsonl")


def test_dataset_is_not_made_again(samples: Path) -> None:
    before = {file: file.read_bytes() for file in (samples / "data/text").iterdir()}
    run(samples, "tokenize text.txt --out data/text --train-vocab 300 --val-fraction 0.2")
    assert {file: file.read_bytes() for file in (samples / "data/text").iterdir()} == before


@pytest.mark.parametrize("line", EVALUATIONS)
def test_evaluation_gives_the_recorded_numbers(samples: Path, line: str) -> None:
    # By itself final/ is computed in bf16 where the processor has it.
    found, expected = run(samples, f"{line} --dtype fp32"), EVALUATIONS[line]
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-5, rel=0)
    for name in ("bits_per_byte", "perplexity"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    assert found["tokens"] == expected["tokens"]
    assert samples / found["checkpoint"] == samples / expected["checkpoint"]


@pytest.mark.parametrize("path", ["runs/adamw", "runs/muon", "runs/base", "runs/lora", "runs/chat",
                                  "data/text", "data/chat"])  # fmt: skip
def test_files_are_valid(samples: Path, path: str) -> None:
    assert run(samples, f"verify {path}")["valid"]


def test_run_is_exported(samples: Path) -> None:
    run(samples, "export runs/base exported")
    loaded = AutoModelForCausalLM.from_pretrained(samples / "exported").state_dict()
    expected = load_file(OLD / "runs/base/final/model.safetensors")
    assert_same_weights({key: loaded[key] for key in expected}, expected)


@pytest.mark.parametrize("name", ["lora", "chat"])
def test_adapter_is_exported(samples: Path, name: str) -> None:
    """Merged, and alone for PEFT: both give the same logits, other than the base's."""
    run(samples, f"export runs/base merged --adapter runs/{name}")
    run(samples, f"export runs/base alone --adapter runs/{name} --adapter-only")
    ids = torch.arange(32)[None] * 9
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(samples / "merged")(ids).logits
        base = AutoModelForCausalLM.from_pretrained(samples / "runs/base/final")
        plain = base(ids).logits
        adapted = PeftModel.from_pretrained(base, samples / "alone").eval()(ids).logits
    torch.testing.assert_close(merged, adapted, **CLOSE)
    assert (merged - plain).abs().max() > 1e-4
