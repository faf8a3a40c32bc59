"""Files and directories that appear whole or not at all; locks."""

import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import pytest

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import locked, remove_stale_directories, whole_directory

DEAD = 2**22 + 1  # no process has this id


def test_a_directory_appears_whole(tmp_path: Path):
    out = tmp_path / "new" / "out"
    with whole_directory(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert (out / "a").read_text() == "1"
    assert os.listdir(out.parent) == ["out"]
    assert out.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    return int(subprocess.run(["sh", "-c", "umask"], capture_output=True, check=True).stdout, 8)


def test_an_error_leaves_nothing(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_text("old")

    def fail() -> None:
        with whole_directory(tmp_path / "out", replace=True) as folder:
            (folder / "a").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out/a").read_text() == "old"


def test_only_an_empty_directory_is_replaced_unasked(tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    with whole_directory(out) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(UserError, match="out: already exists; choose another"):
        whole_directory(out).__enter__()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="link: already exists; choose another"):
        whole_directory(tmp_path / "link").__enter__()
    with whole_directory(out, replace=True) as folder:
        (folder / "a").write_text("2")
    assert (out / "a").read_text() == "2"


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path):
    out = tmp_path / "out"

    def make() -> None:
        with whole_directory(out) as folder:
            (folder / "mine").touch()
            out.mkdir()
            (out / "theirs").touch()

    with pytest.raises(UserError, match="out: already exists; choose another"):
        make()
    assert os.listdir(out) == ["theirs"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("before_writing", [False, True])
def test_stale_directories(tmp_path: Path, before_writing: bool):
    alive = f".out-{os.getpid()}-abc"
    for name in (f".out-{DEAD}-abc", alive, ".out-notes", f".other-{DEAD}-a"):
        (tmp_path / name).mkdir()
    (tmp_path / f".out-{DEAD}-def-old").mkdir()
    (tmp_path / f".out-{DEAD}-def-old/precious").write_text("x")
    if before_writing:
        with pytest.raises(UserError, match="out: already exists"):  # it is back
            whole_directory(tmp_path / "out").__enter__()
    else:
        remove_stale_directories(tmp_path / "out")
    assert (tmp_path / "out/precious").read_text() == "x"
    assert set(os.listdir(tmp_path)) == {"out", alive, ".out-notes", f".other-{DEAD}-a"}


def test_unwritable_place(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/out: can't be written to: "):
        whole_directory(tmp_path / "file" / "out").__enter__()


def test_a_lock_is_for_one_process_and_ends_with_it(tmp_path: Path):
    file = tmp_path / ".lock"
    code = "import sys; from pathlib import Path; from minigpt_cli.core.files import locked\n"
    code += "with locked(Path(sys.argv[1]), 'busy'): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="taken"):
        locked(file, "taken").__enter__()
    other.kill()
    other.communicate()
    with locked(file, "taken"):
        assert file.exists()


def test_a_lock_that_is_held_for_a_moment_is_waited_for(tmp_path: Path):
    file = tmp_path / ".lock"
    file.touch()
    with file.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)  # as `minigpt runs` does
        release = threading.Timer(0.05, fcntl.flock, (stream, fcntl.LOCK_UN))
        release.start()
        with locked(file, "taken"):
            pass
        release.join()


def test_the_lock_of_a_removed_file_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its holder removes it after we have opened it, and before we lock it."""
    file, lock = tmp_path / ".lock", fcntl.flock

    def removed_before(stream: IO[str], how: int) -> None:
        file.unlink()
        lock(stream, how)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with pytest.raises(UserError, match="busy"), locked(file, "busy"):
        pass
