"""Verified files are remembered, and read again after every change that could matter."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from minigpt_cli.core.errors import Damaged
from minigpt_cli.core.files import json_checksum
from minigpt_cli.data import file_checks
from minigpt_cli.data.dataset import open_dataset, verify_dataset
from minigpt_cli.data.dataset_manifest import read_dataset_manifest
from minigpt_cli.data.file_checks import file_states
from minigpt_cli.data.verification import recall, remember, storage_key
from tests.helpers.calls import system_calls
from tests.helpers.token_dataset import VOCAB, build_dataset

FILES = {f"train-{number:05d}.npy" for number in range(4)}


@pytest.fixture
def cache(quick: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(quick / "cache"))
    return quick / "cache" / "minigpt"


@pytest.fixture
def dataset(quick: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset that has been verified. Its files count as old enough to be remembered."""
    build_dataset(quick / "data", np.arange(1000) % VOCAB, 250)
    monkeypatch.setattr(file_checks, "_SETTLED_NS", -(10**12))
    open_dataset(quick / "data", verify=True)
    return quick / "data"


def known(path: Path) -> set[str]:
    manifest = read_dataset_manifest(path)
    return recall(path, manifest, file_states(path, manifest))


def hashed(path: Path) -> int:
    """Verify the dataset and return how many files were read."""
    with system_calls() as calls:
        open_dataset(path, verify=True)
    return calls["preadv"] // 2  # the file, and its end


def test_files_are_read_once(dataset: Path, cache: Path):
    assert known(dataset) == FILES
    assert hashed(dataset) == 0
    (file,) = cache.iterdir()
    assert json.loads(file.read_text())["format"] == 1
    shutil.rmtree(cache)
    assert hashed(dataset) == 4
    assert hashed(dataset) == 0


def test_other_datasets_are_remembered_too(dataset: Path, quick: Path, cache: Path):
    shutil.copytree(dataset, quick / "copy")
    assert hashed(quick / "copy") == 4
    assert hashed(dataset) == hashed(quick / "copy") == 0
    assert len(list(cache.iterdir())) == 2
    (quick / "link").symlink_to(dataset)
    assert hashed(quick / "link") == 0


def flip(file: Path) -> None:
    """Change a token; the size stays."""
    with file.open("r+b") as stream:
        stream.seek(200)
        stream.write(b"\x01\x01")


def flip_and_set_time_back(file: Path) -> None:
    before = file.stat()
    flip(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns


def replace_with_same_time(file: Path) -> None:
    shutil.copy2(file, file.with_name("new"))
    flip_and_set_time_back(file.with_name("new"))
    file.with_name("new").replace(file)


@pytest.mark.parametrize("change", [flip, flip_and_set_time_back, replace_with_same_time])
def test_a_changed_file_is_read_again(dataset: Path, change: Callable[[Path], None]):
    change(dataset / "train-00002.npy")
    assert known(dataset) == FILES - {"train-00002.npy"}
    for _ in range(2):
        with pytest.raises(Damaged, match=r"train-00002\.npy: its content doesn't match"):
            open_dataset(dataset, verify=True)


def test_a_touched_or_restored_file_is_read_again_and_is_fine(dataset: Path, quick: Path):
    file = dataset / "train-00002.npy"
    shutil.copy2(file, quick / "copy")
    os.utime(file)
    assert hashed(dataset) == 1
    shutil.copy2(quick / "copy", file)
    assert hashed(dataset) == 1
    assert hashed(dataset) == 0


def test_another_recorded_sha256_is_compared(dataset: Path):
    record = json.loads((dataset / "dataset.json").read_text())
    del record["checksum"]
    record["splits"]["train"]["shards"][1]["sha256"] = "0" * 64
    record["checksum"] = json_checksum(record)
    (dataset / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(Damaged, match=r"train-00001\.npy: its content doesn't match"):
        open_dataset(dataset, verify=True)
    assert known(dataset) == FILES - {"train-00001.npy"}


def test_verify_reads_everything_and_renews_what_is_known(dataset: Path):
    for _ in range(2):
        with system_calls() as calls:
            assert verify_dataset(dataset) == {}
        assert calls["preadv"] == 8
    (memory,) = (dataset.parent / "cache/minigpt").iterdir()
    # The file is damaged, and the memory says that it isn't, as if the disk had changed by itself
    flip(dataset / "train-00003.npy")
    found = json.loads(memory.read_text())
    state = file_states(dataset, read_dataset_manifest(dataset))["train-00003.npy"]
    sha256 = found["verified"]["train-00003.npy"].split()[-1]
    found["verified"]["train-00003.npy"] = f"{state.text} {sha256}"
    memory.write_text(json.dumps(found))
    assert known(dataset) == FILES
    open_dataset(dataset, verify=True)
    assert list(verify_dataset(dataset)) == ["train-00003.npy"]
    assert known(dataset) == FILES - {"train-00003.npy"}


def test_a_file_that_was_just_written_is_not_remembered(quick: Path, cache: Path):
    """Another change within the same tick of the clock would not show."""
    build_dataset(quick / "data", np.arange(1000) % VOCAB, 250)
    open_dataset(quick / "data", verify=True)
    assert known(quick / "data") == set()
    assert hashed(quick / "data") == 4
    assert not cache.exists()


def test_a_file_that_changes_meanwhile_is_not_remembered(dataset: Path, cache: Path):
    shutil.rmtree(cache)
    manifest = read_dataset_manifest(dataset)
    before = file_states(dataset, manifest)
    os.utime(dataset / "train-00001.npy")
    (dataset / "train-00002.npy").unlink()
    after = file_states(dataset, manifest)
    remember(dataset, manifest, before, {"train-00003.npy"})
    assert recall(dataset, manifest, before) == {"train-00000.npy"}
    assert recall(dataset, manifest, after) == {"train-00000.npy"}


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"dataset": "/elsewhere"},
        {"storage": {"name": "another", "boot": ""}},
        {"storage": None},
        {"verified": []},
        {"verified": {"train-00000.npy": 5}},
        {"other": 1},
    ],
)
def test_a_memory_of_another_form_is_not_used(dataset: Path, cache: Path, change: dict):
    (file,) = cache.iterdir()
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    assert known(dataset) == set()
    assert hashed(dataset) == 4
    assert hashed(dataset) == 0


def test_after_a_restart_local_files_are_read_again(dataset: Path, cache: Path):
    (file,) = cache.iterdir()
    found = json.loads(file.read_text())
    assert found["storage"]["boot"]
    found["storage"]["boot"] = "before"
    file.write_text(json.dumps(found))
    assert hashed(dataset) == 4


def test_the_key_of_a_storage(dataset: Path, quick: Path):
    manifest = read_dataset_manifest(dataset)
    key = storage_key(file_states(dataset, manifest))
    assert key == storage_key(dict(reversed(file_states(dataset, manifest).items())))
    shutil.copytree(dataset, quick / "copy")
    assert key != storage_key(file_states(quick / "copy", manifest))
    os.utime(dataset / "train-00001.npy")
    assert key != storage_key(file_states(dataset, manifest))
