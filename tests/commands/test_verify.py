import json
import shutil
from pathlib import Path

from tests.helpers.commands import finished, refused
from tests.helpers.processes import minigpt


def test_damage_is_named(run: Path, tmp_path: Path, dataset: Path):
    assert finished("verify", run) == f"{run}: valid (3 checked)\n"
    assert finished("verify", dataset) == f"{dataset}: valid (1 checked)\n"
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    state = copy / "checkpoints/step-00000008/state.json"
    state.write_text(state.read_text().replace("8", "9", 1))
    refused(4, "state.json: its content is not what was written", "verify", copy)
    found = json.loads(minigpt("verify", copy, "--json").stdout)
    assert not found["valid"]
    assert found["checked"] == 3
    assert len(found["damaged"]) == 1


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


def test_nothing_to_verify(tmp_path: Path):
    refused(2, "no such run or checkpoint", "verify", tmp_path / "nowhere")
