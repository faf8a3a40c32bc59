"""All ranks verify the dataset together; the damage that one of them finds ends all of them."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minigpt_cli.core.errors import Damaged
from minigpt_cli.data.dataset_manifest import read_dataset_manifest, write_dataset_manifest
from minigpt_cli.data.sequences import open_data
from minigpt_cli.distributed.world import World
from minigpt_cli.prepare.writer import npy_header
from minigpt_cli.recipe import Recipe
from minigpt_cli.train.data_check import open_verified_data, verify_on_each_storage
from tests.helpers.processes import ROOT, command, environment
from tests.helpers.ranks import free_port, rank_environment
from tests.helpers.token_dataset import VOCAB, build_dataset
from tests.helpers.waiting import wait_until

VERIFIES = Path(__file__).parent / "rank_that_verifies.py"
FILES = [f"train-{number:05d}.npy" for number in range(4)]


def test_ranks_divide_the_files_of_each_storage(tmp_path: Path):
    build_dataset(tmp_path / "data", np.arange(1000) % VOCAB, 250)
    build_dataset(tmp_path / "other", np.arange(1000) % 7, 250)
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, str(VERIFIES), str(tmp_path), "check"], cwd=ROOT,
            env=rank_environment(rank, 2, port) | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [4, 4], said
    said_by_both = said[0][1] + said[1][1]
    assert said_by_both.count("minigpt: ") == 1, said
    assert f"minigpt: {tmp_path}/data/train-00003.npy: its content doesn't" in said_by_both
    texts = [said[rank][0].replace(f"machine-{rank}", "copy") for rank in (0, 1)]
    times = [[json.loads(line) for line in text.splitlines()] for text in texts]
    read = [(a["read"], b["read"]) for a, b in zip(*times, strict=True)]
    errors = [(a["error"], b["error"]) for a, b in zip(*times, strict=True)]
    first, again, damaged, repaired, copies, copies_again, one_damaged, different = range(8)

    assert all(a == b for a, b in errors)  # one error, whoever prints it
    fine = (first, again, repaired, copies, copies_again)
    assert all(errors[time] == ([], []) for time in fine)
    assert sorted(read[first][0] + read[first][1]) == FILES
    assert len(read[first][0]) == len(read[first][1]) == 2
    assert read[again] == read[copies_again] == ([], [])
    for time in (damaged, repaired):
        assert sorted(read[time][0] + read[time][1]) == ["train-00001.npy"]
    code, message = errors[damaged][0]
    assert code == 4
    assert message.startswith(
        f"{tmp_path}/data/train-00001.npy: its content doesn't match its sha256; restore it"
    )
    # Each machine reads all of its own copy
    assert read[copies] == (FILES, FILES)
    assert read[one_damaged] == ([], ["train-00002.npy"])
    code, message = errors[one_damaged][0]
    assert code == 4
    host = platform.node()
    assert f"train-00002.npy: its content doesn't match its sha256 on {host}; restore" in message
    assert errors[different][0][0] == 2
    assert "machines hold different datasets" in errors[different][0][1]
    assert read[different] == ([], [])


def flip_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    shutil.copytree(dataset, tmp_path / "data")
    return tmp_path / "data"


def test_a_file_that_is_replaced_after_the_verification_is_found(
    copy: Path, make_recipe: Callable[..., Recipe]
):
    recipe = make_recipe(data=copy)
    world = World(rank=0, size=1, device=torch.device("cpu"))
    states = verify_on_each_storage(copy, world)
    file = copy / "train-00000.npy"
    shutil.copy(file, copy / "new")
    flip_last_byte(copy / "new")
    (copy / "new").replace(file)
    train = open_data(recipe, states).train
    with pytest.raises(Damaged, match=r"train-00000\.npy: was changed since it was checked"):
        train.gather(np.array([0]))
    with pytest.raises(Damaged, match=r"train-00000\.npy: its content doesn't match its sha256"):
        open_verified_data(recipe, world)
    file.unlink()
    with pytest.raises(Damaged, match=r"train-00000\.npy: is missing; restore"):
        open_verified_data(recipe, world)


def test_a_signal_ends_the_verification(copy: Path):
    """Also in the middle of a file that would be read for an hour."""
    manifest = read_dataset_manifest(copy)
    shard = replace(manifest.splits["val"].shards[0], tokens=10**12, bytes_on_disk=128 + 2 * 10**12)
    val = replace(manifest.splits["val"], shards=(shard,), tokens=10**12)
    write_dataset_manifest(copy, replace(manifest, splits=manifest.splits | {"val": val}))
    (copy / shard.file).write_bytes(npy_header(np.dtype(manifest.dtype), 10**12))
    os.truncate(copy / shard.file, shard.bytes_on_disk)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command("verify", copy), stderr=errors, env=environment())
        read = Path(f"/proc/{process.pid}/io")
        wait_until(lambda: int(read.read_text().split()[1]) > 200_000_000)
        process.send_signal(signal.SIGINT)
        assert process.wait(240) == 130
        errors.seek(0)
        assert errors.read() == "minigpt: stopped by SIGINT\n"
