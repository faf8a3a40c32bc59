"""Commit all or nothing; every damage is found; what is kept and what goes."""

import errno
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt_cli.checkpoint import state, store
from minigpt_cli.errors import Damaged, UserError

TENSORS = {
    "weights.a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "optimizer.state.a.step": torch.tensor(7.0),
    "optimizer.state.a.exp_avg": torch.ones(3, 4, dtype=torch.bfloat16),
}


def save(run: Path, step: int, val_loss: float | None = None) -> Path:
    def write(directory: Path) -> None:
        state.write_tensors(directory, TENSORS)
        state.write_state(directory, state.RunState(step=step))

    return store.commit(run, step, write, TENSORS, val_loss)


def kept(run: Path) -> list[int]:
    return [step for step, _ in store.list_steps(run)]


def test_a_commit_reads_back(tmp_path: Path):
    path = save(tmp_path, 500, 1.25)
    assert path == tmp_path / "checkpoints/step-00000500"
    assert store.verify(path) == []
    manifest = store.require_valid(path)
    assert manifest.step == 500
    assert manifest.val_loss == 1.25
    assert manifest.tensors["optimizer.state.a.exp_avg"] == {"dtype": "bfloat16", "shape": [3, 4]}
    read = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    state.read_tensors(path, read, manifest.tensors)
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    assert state.read_state(path).step == 500
    assert [name for name in os.listdir(path.parent) if name.startswith(".")] == []


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path):
    path = save(tmp_path, 1)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        # In the manifest, in its braces and in the first file's size: what it says of the files.
        places = (0, len(content) // 2, len(content) - 1)
        if file.name == "manifest.json":
            places = (0, content.index(b'"bytes": ') + 9, content.index(b'"sha256": "') + 11)
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 4
            file.write_bytes(damaged)
            assert store.verify(path), (file, place)
        for length in (0, len(content) - 1):
            file.write_bytes(content[:length])
            if file.name == "manifest.json" and length:
                continue  # only the last newline is gone
            assert store.verify(path), (file, length)
        file.unlink()
        assert store.verify(path), file
        file.write_bytes(content)
        assert store.verify(path) == []


def test_a_stranger_among_the_files_is_refused(tmp_path: Path):
    path = save(tmp_path, 1)
    shutil.copy(next(path.glob("*.safetensors")), path / "extra.safetensors")
    assert store.verify(path) == [f"{path}/extra.safetensors: is not in the manifest"]


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/passwd", "a/b", "..", ""])
def test_a_manifest_that_leaves_its_directory_is_refused(tmp_path: Path, name: str):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (path / "manifest.json").write_text(json.dumps(manifest))
    (problem,) = store.verify(path)
    assert "names a file outside it" in problem


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1}'])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(Damaged):
        store.require_valid(path)


def test_other_shapes_dtypes_and_names_are_refused(tmp_path: Path):
    path = save(tmp_path, 1)
    recorded = store.read_manifest(path).tensors
    for wanted in (
        {"weights.a": torch.zeros(4, 3)},
        {"weights.a": torch.zeros(3, 4, dtype=torch.float64)},
        {"weights.b": torch.zeros(3, 4)},
    ):
        with pytest.raises(UserError, match="belongs to another model, optimizer or precision"):
            state.read_tensors(path, wanted, recorded)


def test_a_failed_write_leaves_no_trace(tmp_path: Path):
    save(tmp_path, 1)

    def write(directory: Path) -> None:
        (directory / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="the disk is full; older checkpoints are untouched"):
        store.commit(tmp_path, 2, write, TENSORS, None)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000001"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_is_one_line_and_keeps_what_is_there(tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", run], check=False)
    if mounted.returncode:
        pytest.skip("no permission to mount")
    try:
        save(run, 1)
        big = {"weights.a": torch.ones(1000, 1000)}
        with pytest.raises(UserError, match="the disk is full"):
            store.commit(run, 2, lambda d: state.write_tensors(d, big), big, None)
        assert kept(run) == [1]
        assert store.verify(run / "checkpoints/step-00000001") == []
        assert [n for n in os.listdir(run / "checkpoints") if n.startswith(".")] == []
    finally:
        subprocess.run(["umount", run], check=True)


def test_newest_valid_walks_back(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoints/step-00000003/state.json").write_text("{}")
    (tmp_path / "checkpoints/.writing-step-00000004").mkdir()
    path, manifest, passed_over = store.newest_valid(tmp_path)
    assert (path.name, manifest.step) == ("step-00000002", 2)
    assert len(passed_over) == 1
    assert passed_over[0].startswith("step-00000003 passed over: ")
    for step in (1, 2):
        (tmp_path / f"checkpoints/step-0000000{step}/manifest.json").unlink()
    with pytest.raises(Damaged, match="no valid checkpoint"):
        store.newest_valid(tmp_path)
    with pytest.raises(UserError, match="no checkpoint yet"):
        store.newest_valid(tmp_path / "other")


@settings(max_examples=30, deadline=None)
@given(
    losses=st.lists(st.one_of(st.none(), st.floats(0, 9)), min_size=1, max_size=9),
    keep_last=st.integers(1, 3),
    keep_best=st.booleans(),
    keep_every=st.one_of(st.none(), st.integers(1, 5)),
)
def test_retention(
    tmp_path_factory: pytest.TempPathFactory,
    losses: list[float | None],
    keep_last: int,
    keep_best: bool,
    keep_every: int | None,
):
    run = tmp_path_factory.mktemp("run")
    for step, loss in enumerate(losses, 1):
        store.commit(run, step, lambda d: (d / "x").write_text("x"), {}, loss)
    store.retain(run, keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
    steps = range(1, len(losses) + 1)
    expected = set(list(steps)[-keep_last:])
    if keep_every:
        expected |= {step for step in steps if step % keep_every == 0}
    rated = [(loss, step) for step, loss in enumerate(losses, 1) if loss is not None]
    if keep_best and rated:
        expected.add(min(rated)[1])
    assert set(kept(run)) == expected


def test_sweep_removes_what_a_kill_left(tmp_path: Path):
    save(tmp_path, 1)
    for name in (".writing-step-00000002", ".deleting-step-00000000"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "x").write_text("x")
    store.sweep(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_locate(tmp_path: Path):
    path = save(tmp_path / "run", 5)
    assert store.locate(tmp_path / "run") == (tmp_path / "run", None)
    assert store.locate(path.parent) == (tmp_path / "run", None)
    assert store.locate(path) == (tmp_path / "run", path)
    with pytest.raises(UserError, match="no such run or checkpoint"):
        store.locate(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither a run directory nor a checkpoint"):
        store.locate(tmp_path)


def test_a_step_saved_again_in_vain_keeps_its_first_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The disk fails between moving the old checkpoint aside and putting the new one there."""
    path = save(tmp_path, 5)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.startswith(".writing"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match="older checkpoints are untouched"):
        save(tmp_path, 5, 1.5)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert os.listdir(path.parent) == [path.name]
