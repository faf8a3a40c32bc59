import json
import os
import socket
from pathlib import Path

import pytest

from minigpt_cli.core.user_cache import read_cached, write_cached
from tests.helpers.processes import NOBODY

CONTENT = {"a": [1, "ü"]}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "minigpt"


def test_only_the_user_can_write_it(folder: Path):
    assert read_cached("x.json") is None
    before = os.umask(0)
    try:
        write_cached("x.json", CONTENT)
    finally:
        os.umask(before)
    assert read_cached("x.json") == CONTENT
    assert (folder.stat().st_mode & 0o777, (folder / "x.json").stat().st_mode & 0o777) == (
        0o700,
        0o600,
    )
    assert os.listdir(folder) == ["x.json"]
    write_cached("x.json", {})
    assert read_cached("x.json") == {}


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
@pytest.mark.parametrize("what", [".", "x.json"])
def test_what_others_may_write_is_ignored(folder: Path, mode: int, what: str):
    write_cached("x.json", CONTENT)
    (folder / what).chmod(mode | 0o100)
    assert read_cached("x.json") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.parametrize("what", [".", "x.json"])
def test_what_belongs_to_others_is_ignored(folder: Path, what: str):
    write_cached("x.json", CONTENT)
    os.chown(folder / what, NOBODY, NOBODY)
    assert read_cached("x.json") is None


def test_what_is_broken_is_ignored_and_replaced(folder: Path):
    write_cached("x.json", CONTENT)
    whole = json.dumps(CONTENT).encode()
    for content in (b"", whole[:-1], b"[1]", b"\xff", b"[" * 100_000, b" " * (17 << 20) + whole):
        (folder / "x.json").write_bytes(content)
        (folder / "x.json").chmod(0o600)
        assert read_cached("x.json") is None
    for make in (os.mkfifo, os.mkdir, lambda path: socket.socket(socket.AF_UNIX).bind(str(path))):
        (folder / "x.json").unlink(missing_ok=True)
        make(folder / "x.json")
        assert read_cached("x.json") is None
        if (folder / "x.json").is_dir():
            (folder / "x.json").rmdir()
    write_cached("x.json", CONTENT)
    assert read_cached("x.json") == CONTENT


def test_a_cache_that_can_t_be_written_is_no_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder.parent.write_text("a file")
    write_cached("x.json", CONTENT)
    assert read_cached("x.json") is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/1")
    write_cached("x.json", CONTENT)
    assert read_cached("x.json") is None


def test_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As the XDG Base Directory Specification says: a relative path is ignored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        write_cached(f"{value}x.json", CONTENT)
        assert (tmp_path / "home/.cache/minigpt" / f"{value}x.json").exists()
    monkeypatch.setenv("HOME", "nowhere")
    write_cached("x.json", CONTENT)
    assert read_cached("x.json") is None
    assert os.listdir(tmp_path) == ["home"]
