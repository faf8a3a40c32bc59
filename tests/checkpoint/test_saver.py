"""Saving while training goes on: a snapshot, all or nothing, and a full disk is survived."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageReader

from minigpt_cli.checkpoint import integrity, state, store
from minigpt_cli.checkpoint.saver import Saver, check_room
from minigpt_cli.checkpoint.tensors import read_tensors
from minigpt_cli.core.errors import Stopped, UserError
from minigpt_cli.distributed.world import World
from minigpt_cli.recipe import CheckpointSettings

WORLD = World(rank=0, size=1, device=torch.device("cpu"))
both = pytest.mark.parametrize("asynchronous", [False, True])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a disk of 2 MB."""
    run = tmp_path / "run"
    run.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(run)]
    if os.geteuid() or subprocess.run(command, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield run
    subprocess.run(["umount", run], check=True)


def tensors(elements: int = 1000) -> dict[str, torch.Tensor]:
    return {
        "weights.a": torch.arange(elements, dtype=torch.float32),
        "optimizer.a": torch.ones(elements),
    }


def small(step: int) -> dict[str, bytes]:
    of_step = state.state_bytes(state.RunState(step=step))
    return {"state.json": of_step, "recipe.toml": b"", "tokenizer.json": b"{}"}


def read(checkpoint: Path) -> dict[str, torch.Tensor]:
    manifest = integrity.require_valid(checkpoint)
    found = {
        name: torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for name, entry in manifest.tensors.items()
    }
    read_tensors(checkpoint, found, manifest)
    return found


@both
def test_a_save_is_a_snapshot(tmp_path: Path, asynchronous: bool):
    """The optimizer writes into the same tensors while they are saved."""
    saver = Saver(tmp_path, WORLD, CheckpointSettings(asynchronous=asynchronous, keep_last=9))
    changing = tensors(200_000)
    for step in (1, 2, 3):
        before = {name: tensor.clone() for name, tensor in changing.items()}
        saver.start(step, changing, small(step), None)
        for tensor in changing.values():
            tensor.add_(step)
        saved = saver.wait()
        assert saved is not None
        assert (saved.step, saved.problem) == (step, None)
        assert saver.last_saved_step == step
        found = read(saved.path)
        assert all(torch.equal(found[name], before[name]) for name in before)
        assert saver.wait() is None
    assert [step for step, _ in store.list_steps(tmp_path)] == [1, 2, 3]
    assert (saved.path / "tokenizer.json").read_bytes() == b"{}"
    saver.close()


def test_an_error_while_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A signal's, or the disk's: it must reach us as it is."""
    saver = Saver(tmp_path, WORLD, CheckpointSettings(asynchronous=False))
    saver.start(1, tensors(), small(1), None)
    saved = saver.wait()
    assert saved is not None
    for happens in (Stopped("stopped by SIGTERM", 15), OSError(errno.EIO, "Input/output error")):

        def fail(*_: object, happens: Exception = happens) -> None:
            raise happens

        monkeypatch.setattr(HuggingFaceStorageReader, "read_data", fail)
        with pytest.raises(type(happens)) as caught:
            read(saved.path)
        assert caught.value is happens


@both
def test_full_disk(small_disk: Path, asynchronous: bool):
    saver = Saver(small_disk, WORLD, CheckpointSettings(asynchronous=asynchronous))
    saver.start(1, tensors(), small(1), None)
    saved = saver.wait()
    assert saved is not None
    assert saved.problem is None
    before = {file.name: file.read_bytes() for file in saved.path.iterdir()}
    # More than there is, seen before it is written; and less, but too much for what comes later.
    for elements, why in ((10**6, "it takes 8.00 MB, and "), (240_000, "the disk is full")):
        filler = small_disk / "filler"
        if why == "the disk is full":
            filler.write_bytes(bytes(2 * 2**20 - 8 * elements - 40_000))
        saver.start(2, tensors(elements), small(2), None)
        saved = saver.wait()
        assert saved is not None
        assert saved.problem is not None
        assert why in saved.problem
        assert saver.last_saved_step == 1
        checkpoints = small_disk / "checkpoints"
        assert os.listdir(checkpoints) == ["step-00000001"]
        whole = {file.name: file.read_bytes() for file in (checkpoints / "step-00000001").iterdir()}
        assert whole == before
    filler.unlink()
    saver.start(3, tensors(), small(3), None)
    saved = saver.wait()
    assert saved is not None
    assert saved.problem is None
    saver.close()


def test_unwritable_directory(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("a file where the directory should be")
    saver = Saver(tmp_path, WORLD, CheckpointSettings())
    saver.start(1, tensors(), small(1), None)
    saved = saver.wait()
    assert saved is not None
    assert saved.problem == "File exists"
    saver.close()


def test_check_room(small_disk: Path):
    assert check_room(small_disk, 100_000, CheckpointSettings(keep_last=2)) is None
    warning = check_room(small_disk, 900_000, CheckpointSettings(keep_last=2))
    assert warning is not None
    assert "up to 4 checkpoints of 0.90 MB will be there at once, and 2.10 MB are free" in warning
    with pytest.raises(UserError, match=r"a checkpoint takes 3\.00 MB, and 2\.10 MB are free"):
        check_room(small_disk, 3_000_000, CheckpointSettings())
