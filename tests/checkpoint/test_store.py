"""Commit all or nothing; every damage is found; what is kept and what goes."""

import errno
import hashlib
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt_cli.checkpoint import integrity, store
from minigpt_cli.checkpoint.commit import abandon, begin, commit, flush_files
from minigpt_cli.checkpoint.manifest import read_checkpoint_manifest
from minigpt_cli.checkpoint.state import RunState, read_state, state_bytes
from minigpt_cli.checkpoint.tensors import read_tensors, save_tensors, tensor_entry
from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.core.files import sha256_of
from minigpt_cli.distributed.world import start_world
from tests.helpers.processes import ROOT
from tests.helpers.ranks import free_port, rank_environment

TENSORS = {
    "weights.a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "optimizer.state.a.step": torch.tensor(7.0),
    "optimizer.state.a.exp_avg": torch.ones(3, 4, dtype=torch.bfloat16),
}


def save(run: Path, step: int, val_loss: float | None = None) -> Path:
    directory = begin(run, step, {"state.json": state_bytes(RunState(step=step))})
    save_tensors(directory, TENSORS, TENSORS, 0)
    files = flush_files(directory.iterdir())
    described = {name: tensor_entry(tensor) for name, tensor in TENSORS.items()}
    return commit(run, step, files, described, val_loss)


def kept(run: Path) -> list[int]:
    return [step for step, _ in store.list_steps(run)]


def test_commit_reads_back(tmp_path: Path):
    path = save(tmp_path, 500, 1.25)
    assert path == tmp_path / "checkpoints/step-00000500"
    assert integrity.verify(path) == []
    manifest = integrity.require_valid(path)
    assert manifest.step == 500
    assert manifest.val_loss == 1.25
    assert manifest.tensors["optimizer.state.a.exp_avg"] == {"dtype": "bfloat16", "shape": [3, 4]}
    read = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    read_tensors(path, read, manifest)
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    assert read_state(path).step == 500
    assert [name for name in os.listdir(path.parent) if name.startswith(".")] == []


def test_damage_is_found(tmp_path: Path):
    path = save(tmp_path, 1)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        places = (0, len(content) // 2, len(content) - 2)
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 4
            file.write_bytes(damaged)
            assert integrity.verify(path), (file, place)
        for length in (0, len(content) - 1):
            file.write_bytes(content[:length])
            assert integrity.verify(path), (file, length)
        file.unlink()
        assert integrity.verify(path), file
        file.write_bytes(content)
        assert integrity.verify(path) == []


def test_extra_file(tmp_path: Path):
    path = save(tmp_path, 1)
    shutil.copy(next(path.glob("*.safetensors")), path / "extra.safetensors")
    assert integrity.verify(path) == [f"{path}/extra.safetensors: is not in the manifest"]


@pytest.mark.parametrize("name", ["../outside.txt", "/etc/passwd", "a/b", "..", ""])
def test_manifest_names_a_file_outside(tmp_path: Path, name: str):
    path = save(tmp_path, 1)
    files = read_checkpoint_manifest(path).files
    forge(path, files=files | {name: {"bytes": 1, "sha256": "0" * 64}})
    (problem,) = integrity.verify(path)
    assert "names a file outside it" in problem


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1}', "[" * 100_000]
)
def test_malformed_manifest(tmp_path: Path, text: str):
    path = save(tmp_path, 1)
    (path / "manifest.json").write_text(text)
    with pytest.raises(Damaged):
        integrity.require_valid(path)


def forge(path: Path, **changes: object) -> None:
    """Change the manifest, and its checksum with it, as somebody would who means to deceive."""
    manifest = json.loads((path / "manifest.json").read_text()) | changes
    manifest.pop("checksum")
    text = json.dumps(manifest, sort_keys=True)
    manifest["checksum"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def test_forged_manifest(tmp_path: Path):
    path = save(tmp_path, 1)
    true = read_checkpoint_manifest(path)
    more = true.tensors | {"weights.b": {"dtype": "float32", "shape": [2]}}
    fewer = {name: entry for name, entry in true.tensors.items() if name != "weights.a"}
    cast = true.tensors | {"weights.a": {"dtype": "float64", "shape": [3, 4]}}
    longer = true.tensors | {"weights.a": {"dtype": "float32", "shape": [4, 4]}}
    for tensors, problem in (
        (more, "holds 0 of 2 elements of weights.b"),
        (fewer, "weights.a differs from the manifest"),
        (cast, "weights.a differs from the manifest"),
        (longer, "holds 12 of 16 elements of weights.a"),
    ):
        forge(path, tensors=tensors)
        assert any(problem in each for each in integrity.verify(path)), problem
    forge(path, tensors=true.tensors, step=2)
    assert "its manifest is of step 2" in integrity.verify(path)[0]
    forge(path, step=1)
    assert integrity.verify(path) == []
    for field, value in (
        ("step", "1"), ("val_loss", "low"), ("val_loss", math.nan), ("files", []), ("tensors", []),
        ("tensors", {"weights.a": "float32"}), ("tensors", {"weights.a": {"dtype": "float32"}}),
        ("tensors", {"weights.a": {"dtype": "float32", "shape": "34"}}),
        ("tensors", {"weights.a": {"dtype": "float32", "shape": [-3, -4]}}),
    ):  # fmt: skip
        forge(path, **{field: value})
        (problem,) = integrity.verify(path)
        assert "manifest.json: is not a manifest" in problem
        forge(path, **{field: true.__dict__[field]})
    assert integrity.verify(path) == []


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_manifest_is_a_regular_file(tmp_path: Path, kind: str):
    """A pipe that nobody writes to would be waited for."""
    path = save(tmp_path, 1)
    manifest = (path / "manifest.json").rename(tmp_path / "elsewhere")
    if kind == "link":
        (path / "manifest.json").symlink_to(manifest)
    elif kind == "pipe":
        os.mkfifo(path / "manifest.json")
    else:
        (path / "manifest.json").mkdir()
    (problem,) = integrity.verify(path)
    assert "manifest.json: is not a regular file" in problem


@pytest.mark.parametrize("offset", [1, 10**6, -1, "x"])
def test_forged_shard_offsets(tmp_path: Path, offset: object):
    path = save(tmp_path, 1)
    (name,) = (file.name for file in path.glob("*00001-of-00002.safetensors"))
    content = (path / name).read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    places = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    places["weights.a"]["saved_offsets"] = [offset, 0]
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(places)
    text = json.dumps(header).encode()
    (path / name).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    vouch(path, name)
    (problem,) = integrity.verify(path)
    assert ("overlap" if isinstance(offset, int) else "is not a safetensors file") in problem


def vouch(path: Path, name: str) -> None:
    """Have the manifest say that this file is as it should be."""
    content = (path / name).read_bytes()
    entry = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    forge(path, files=read_checkpoint_manifest(path).files | {name: entry})


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", b"\x80\x04", '{"step": 2}', '{"step": 1, "tokens": "1"}',
     '{"step": 1, "scaler": []}', '{"step": 1, "what": 1}', '{"step": true}', "[" * 100_000],
)  # fmt: skip
def test_invalid_state(tmp_path: Path, content: str | bytes):
    path = save(tmp_path, 1)
    (path / "state.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    vouch(path, "state.json")
    (problem,) = integrity.verify(path)
    assert "state.json: " in problem


def test_pickle_in_the_manifest(tmp_path: Path):
    path = save(tmp_path, 1)
    files = read_checkpoint_manifest(path).files
    torch.save({"weights.a": torch.zeros(3, 4)}, path / "model.pt")
    assert "is not in the manifest" in integrity.verify(path)[0]
    entry = {"bytes": (path / "model.pt").stat().st_size,
             "sha256": sha256_of(path / "model.pt")}  # fmt: skip
    forge(path, files=files | {"model.pt": entry})
    assert "names model.pt, which no checkpoint holds" in integrity.verify(path)[0]
    (path / "model.pt").rename(path / "model.safetensors")
    forge(path, files=files | {"model.safetensors": entry})
    assert "is not a safetensors file" in integrity.verify(path)[0]


def test_other_tensors(tmp_path: Path):
    path = save(tmp_path, 1)
    manifest = read_checkpoint_manifest(path)
    for wanted in (
        {"weights.a": torch.zeros(4, 3)},
        {"weights.a": torch.zeros(3, 4, dtype=torch.float64)},
        {"weights.b": torch.zeros(3, 4)},
    ):
        with pytest.raises(UserError, match="belongs to another model, optimizer or precision"):
            read_tensors(path, wanted, manifest)


def test_headers_are_read_by_one_rank(tmp_path: Path):
    """The other one reads no file that it needs no values of."""
    path, port = save(tmp_path, 1), free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, Path(__file__).parent / "rank_that_reads.py", path], cwd=ROOT,
            env=rank_environment(rank, 2, port), stdout=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0]
    assert json.loads(said[0]) == {name: tensor.sum().item() for name, tensor in TENSORS.items()}


def test_newest_valid_walks_back(tmp_path: Path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "checkpoints/step-00000003/state.json").write_text("{}")
    (tmp_path / "checkpoints/.writing-step-00000004").mkdir()
    path, manifest, skipped = store.newest_valid(tmp_path)
    assert (path.name, manifest.step) == ("step-00000002", 2)
    assert len(skipped) == 1
    assert skipped[0].startswith("step-00000003 skipped: ")
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
def test_prune(
    tmp_path_factory: pytest.TempPathFactory,
    losses: list[float | None],
    keep_last: int,
    keep_best: bool,
    keep_every: int | None,
):
    run = tmp_path_factory.mktemp("run")
    for step, loss in enumerate(losses, 1):
        directory = begin(run, step, {"state.json": b"x"})
        commit(run, step, flush_files(directory.iterdir()), {}, loss)
    store.prune(run, keep_last=keep_last, keep_best=keep_best, keep_every=keep_every)
    steps = range(1, len(losses) + 1)
    expected = set(list(steps)[-keep_last:])
    if keep_every:
        expected |= {step for step in steps if step % keep_every == 0}
    rated = [(loss, step) for step, loss in enumerate(losses, 1) if loss is not None]
    if keep_best and rated:
        expected.add(min(rated)[1])
    assert set(kept(run)) == expected


def test_remove_stale(tmp_path: Path):
    save(tmp_path, 1)
    for name in (".writing-step-00000002", ".deleting-step-00000000"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "x").write_text("x")
    store.remove_stale(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["step-00000001"]


def test_next_save_removes_stale(tmp_path: Path):
    """On a disk that was read-only for a while, in the middle of a save or a deletion."""
    save(tmp_path, 1)
    for name in (".writing-step-00000002", ".deleting-step-00000000"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "x").write_text("x")
    save(tmp_path, 3)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["step-00000001", "step-00000003"]


def test_replaced_checkpoint_is_restored(tmp_path: Path):
    assert not store.holds_a_checkpoint(tmp_path)
    path = save(tmp_path, 1)
    assert store.holds_a_checkpoint(tmp_path)
    path.rename(path.with_name(f".replaced-{path.name}"))
    assert store.holds_a_checkpoint(tmp_path)
    store.remove_stale(tmp_path)
    assert kept(tmp_path) == [1]


def test_locate(tmp_path: Path):
    path = save(tmp_path / "run", 5)
    assert store.locate(tmp_path / "run") == (tmp_path / "run", None)
    assert store.locate(path.parent) == (tmp_path / "run", None)
    assert store.locate(path) == (tmp_path / "run", path)
    with pytest.raises(UserError, match="no such run or checkpoint"):
        store.locate(tmp_path / "nothing")
    with pytest.raises(UserError, match="neither a run directory nor a checkpoint"):
        store.locate(tmp_path)


def test_failed_second_save_keeps_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk fails between moving the old checkpoint aside and putting the new one there."""
    path = save(tmp_path, 5)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.startswith(".writing"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output error"):
        save(tmp_path, 5, 1.5)
    abandon(tmp_path, 5)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert os.listdir(path.parent) == [path.name]


def test_a_checkpoint_that_is_read_is_pruned_later(tmp_path: Path):
    """Two at most are spared: a reader that never ends must not fill the disk."""
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    for step in (1, 2, 3):
        store.hold(tmp_path / f"checkpoints/step-{step:08d}")
    store.prune(tmp_path, keep_last=1, keep_best=False, keep_every=None)
    assert kept(tmp_path) == [1, 2, 5]


def test_a_run_does_not_hold_its_own_checkpoint(tmp_path: Path):
    """``resume`` of a named checkpoint is a reader that prunes."""
    world = start_world()
    named = save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "recipe.toml").write_text("")
    store.choose(named, world)
    store.prune(tmp_path, keep_last=1, keep_best=False, keep_every=None)
    assert kept(tmp_path) == [2]
    save(tmp_path, 3)
    store.choose(tmp_path / "checkpoints/step-00000002")  # as sample does
    store.prune(tmp_path, keep_last=1, keep_best=False, keep_every=None)
    assert kept(tmp_path) == [2, 3]


def test_a_pipe_in_place_of_a_manifest_does_not_stop_pruning(tmp_path: Path):
    manifest = save(tmp_path, 1) / "manifest.json"
    save(tmp_path, 2)
    manifest.unlink()
    os.mkfifo(manifest)
    store.prune(tmp_path, keep_last=1, keep_best=False, keep_every=None)
    assert kept(tmp_path) == [2]
