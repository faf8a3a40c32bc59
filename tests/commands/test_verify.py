import json
import shutil
from pathlib import Path

from tests.helpers.commands import finished, refused
from tests.helpers.processes import minigpt


def test_damage_is_named(run: Path, tmp_path: Path, dataset: Path):
    assert finished("verify", run) == f"{run}: valid (4 checked)\n"  # and final/
    assert finished("verify", dataset) == f"{dataset}: valid (1 checked)\n"
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    state = copy / "checkpoints/step-00000008/state.json"
    state.write_text(state.read_text().replace("8", "9", 1))
    refused(4, "state.json: its content is not what was written", "verify", copy)
    found = json.loads(minigpt("verify", copy, "--json").stdout)
    assert not found["valid"]
    assert found["checked"] == 4
    assert len(found["damaged"]) == 1
    state.write_text(state.read_text().replace("9", "8", 1))
    with (copy / "final/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    refused(4, "final/model.safetensors: ", "verify", copy)


def test_damage_of_a_dataset(dataset: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    with (copy / "train-00000.npy").open("r+b") as file:
        file.seek(1000)
        file.write(b"\xff" * 8)
    (copy / "val-00000.npy").unlink()
    refused(4, "train-00000.npy: its content doesn't match its sha256; val-", "verify", copy)
    refused(4, "val-00000.npy: is missing", "verify", copy)
    found = json.loads(minigpt("verify", copy, "--json").stdout)
    assert found["damaged"] == ["train-00000.npy", "val-00000.npy"]


def test_export(run: Path, tmp_path: Path):
    """Only the card may be edited. An export by an earlier version has no checksums."""
    copy = tmp_path / "final"
    shutil.copytree(run / "final", copy)
    (copy / "README.md").write_text("edited")
    (copy / "notes.txt").write_text("mine")
    assert finished("verify", copy) == f"{copy}: valid (1 checked)\n"
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-8, 2)
        file.write(b"12345678")
    (copy / "generation_config.json").unlink()
    (copy / "config.json").write_text("{}")
    (copy / "chat_template.jinja").write_text("x")
    refused(4, "model.safetensors: its content doesn't match its sha256", "verify", copy)
    found = json.loads(minigpt("verify", copy, "--json").stdout)
    assert not found["valid"]
    assert sorted(found["damaged"]) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    origin = json.loads((copy / "minigpt.json").read_text())
    for files in (5, {"config.json": 5}, {"config.json": {"bytes": -1, "sha256": "x"}}):
        (copy / "minigpt.json").write_text(json.dumps(origin | {"files": files}))
        refused(4, "minigpt.json: files", "verify", copy)
    entry = {"bytes": 1, "sha256": "x"}
    (copy / "minigpt.json").write_text(json.dumps(origin | {"files": {"../a": entry}}))
    refused(4, "../a: is outside the directory", "verify", copy)
    del origin["files"]
    (copy / "minigpt.json").write_text(json.dumps(origin))
    refused(2, "is a Hugging Face directory without checksums", "verify", copy)
    (copy / "minigpt.json").unlink()
    refused(2, "is a Hugging Face directory without checksums", "verify", copy)


def test_nothing_to_verify(tmp_path: Path, dataset: Path):
    (tmp_path / "file").write_text("")
    refused(2, "file: is a file", "verify", tmp_path / "file")
    refused(2, "it holds no recipe.toml; nor a Hugging Face", "verify", tmp_path)
    refused(2, "no such run or checkpoint", "verify", tmp_path / "nowhere")
