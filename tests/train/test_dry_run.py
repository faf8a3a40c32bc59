"""--dry-run as users run it: what it prints, and that it leaves nothing."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.helpers.commands import finished, refused
from tests.helpers.models import saved_model
from tests.helpers.processes import ROOT, fork, minigpt
from tests.train.test_finetune import CHATS, OWN_TEMPLATE, recipe


def content(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def dry_run(*arguments: object, cwd: Path | None = None) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(finished(*arguments, "--dry-run", "--json", cwd=cwd))
    return found


def test_the_first_sequence(recipe_file: Path, dataset: Path, tmp_path: Path):
    before = content(dataset), content(tmp_path)
    found = dry_run("pretrain", recipe_file, cwd=tmp_path)
    shown = minigpt("pretrain", recipe_file, "--dry-run", cwd=tmp_path)
    assert (content(dataset), content(tmp_path)) == before

    start = found["sequence"]["index"] * 32
    tokens = np.load(dataset / "train-00000.npy")[start : start + 33].tolist()
    tokenizer = Tokenizer.from_file(str(dataset / "tokenizer.json"))
    text = tokenizer.decode(tokens, skip_special_tokens=False)
    (parts,) = found["sequence"]["examples"]
    assert parts == [{"text": text, "tokens": 33, "in_loss": True}]
    assert shown.returncode == 0
    assert shown.stdout.splitlines() == [f"+ | {line}".rstrip() for line in text.split("\n")]
    assert "vocabulary 320 padded to 384;" in shown.stderr
    assert "nothing was written" in shown.stderr
    assert found["dataset"] == str(dataset)
    assert found["warnings"] == []
    assert found["vocab_size"] == 384
    assert found["expected_loss"] == np.log(320)
    assert found["first_loss"] == pytest.approx(np.log(384), rel=0.02)
    assert found["loss"] == pytest.approx(np.log(384), rel=0.1)
    assert found["tokens"] == 12 * 8 * 32


SMALL = [
    word
    for setting in ("model.hidden_size=32", "model.num_hidden_layers=1",
                    "model.intermediate_size=64", "train.sequence_length=32")
    for word in ("--set", setting)
]  # fmt: skip


def test_a_dataset_that_is_not_there(tmp_path: Path):
    """A shipped recipe, with another text and a smaller model."""
    text = (ROOT / "LICENSE").read_text()
    (tmp_path / "text.txt").write_text(text)
    settings = ("--set", "data.source.kind=files", "--set", "data.source.path=text.txt")
    work = tmp_path / "temporary"
    work.mkdir()
    log, output = tmp_path / "log", tmp_path / "output"
    arguments = ("pretrain", ROOT / "recipes/tiny.toml", *settings, *SMALL, "--dry-run", "--json")
    assert fork(log, *arguments, output=output, TMPDIR=str(work)).wait() == 0, log.read_text()
    found = json.loads(output.read_text())
    ((part,),) = found["sequence"]["examples"]
    assert part["text"].removesuffix("<|endoftext|>") in text
    assert found["dataset"] is None
    assert found["vocab_size"] == 4096  # as asked for; this text gives a smaller tokenizer
    assert (
        "data/tiny isn't there yet: this looks only at the beginning of its source (1 document)"
        in log.read_text()
    )
    assert os.listdir(work) == []
    assert sorted(os.listdir(tmp_path)) == ["log", "output", "temporary", "text.txt"]


def test_only_the_beginning_of_a_large_source_is_read(tmp_path: Path):
    (tmp_path / "a.py").write_text("import os  # read first\n" * 50_000)
    (tmp_path / "b.py").write_bytes(b"\xff\xfe\x00 not UTF-8, and never read")
    found = minigpt(
        "pretrain", ROOT / "recipes/tiny.toml", "--set", "data.source.kind=files",
        "--set", 'data.source.path=["a.py", "b.py"]', *SMALL, "--dry-run", cwd=tmp_path,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "read first" in found.stdout


def test_chats(tmp_path: Path, license_dataset: Path):
    """A mark shows what the loss counts: the answers, and the end of each."""
    _, base = saved_model("llama", tmp_path / "base", license_dataset)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["chat_template"] = OWN_TEMPLATE
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(each) + "\n" for each in CHATS[:8]))
    source = f'[data.source]\nkind = "jsonl"\npath = "{chats}"\nformat = "instructions"'
    file = recipe(tmp_path, base, tmp_path / "data", source)
    length = ("--set", "train.sequence_length=90")
    before = content(tmp_path)
    found = dry_run("finetune-lora", file, *length, cwd=tmp_path)
    shown = finished("finetune-lora", file, *length, "--dry-run", cwd=tmp_path).splitlines()
    assert content(tmp_path) == before
    for parts in found["sequence"]["examples"]:
        (question, answer) = parts
        number = question["text"].split()[3]
        assert question["text"] == f"user> What is {number} plus {number}?<|endoftext|>assistant> "
        assert answer["text"] == f"It is {2 * int(number)}.<|endoftext|>"
        assert (question["in_loss"], answer["in_loss"]) == (False, True)
        assert f"  | {question['text'].rstrip()}" in shown
        assert f"+ | {answer['text']}" in shown
    taken = sum(p["tokens"] for parts in found["sequence"]["examples"] for p in parts)
    padding = 90 - (taken - len(found["sequence"]["examples"]))
    assert shown[-1] == f"padding: {padding} tokens"
    assert 0 < found["trained_parameters"] < found["parameters"]


def test_what_a_start_refuses(tmp_path: Path, recipe_file: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("{}")
    again = ("pretrain", recipe_file, "--dry-run", "--out")
    refused(2, "holds metrics.jsonl, which the run would overwrite", *again, tmp_path / "run")
    refused(2, "/proc: a checkpoint takes", *again, "/proc/run")
    refused(2, "tiny.toml is not a directory", *again, recipe_file / "run")
    missing = ("--set", "data.source.kind=files", "--set", "data.source.path=nowhere")
    refused(2, "no such file", "pretrain", ROOT / "recipes/tiny.toml", "--dry-run", *missing)
    used = ("--set", f"data.path={tmp_path / 'run'}")
    refused(2, "which is not a file of a dataset", "pretrain", ROOT / "recipes/tiny.toml",
            "--dry-run", *used)  # fmt: skip
    both = ("pretrain", recipe_file, "--dry-run", "--overfit-one-batch")
    refused(2, "give one of them", *both)


def test_a_model_whose_loss_is_not_finite(recipe_file: Path, tmp_path: Path):
    refused(3, "the loss of one sequence is ", "pretrain", recipe_file, "--dry-run",
            "--set", "model.initializer_range=1e30", cwd=tmp_path)  # fmt: skip


def test_several_ranks(recipe_file: Path, tmp_path: Path):
    before = content(tmp_path)
    found = dry_run("pretrain", recipe_file, "--nproc", "2", "--set", "distributed.strategy=fsdp",
                    cwd=tmp_path)  # fmt: skip
    assert (found["ranks"], found["strategy"]) == (2, "fsdp")
    assert content(tmp_path) == before
