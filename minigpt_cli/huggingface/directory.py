"""A directory that appears under its name whole, or not at all."""

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from minigpt_cli.checkpoint.state import STATE_FILE
from minigpt_cli.checkpoint.store import is_checkpoint, list_steps
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import sync_directory


@contextlib.contextmanager
def directory_in_place(out: Path, replace: bool = False) -> Iterator[Path]:
    """A directory to write to, which gets the name ``out`` when the ``with`` block has succeeded.

    Raises:
        UserError: ``out`` is there already and not to be replaced, or can't be written to.
    """
    out = Path(os.path.abspath(out))
    _check_place(out, replace)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        sweep(out)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-{os.getpid()}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"{out}: can't be written to: {error.strerror}") from None
    try:
        folder.chmod(0o755 & ~_umask())
        yield folder
        for file in folder.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        sync_directory(folder)
        _check_place(out, replace)  # again: it may have been made meanwhile
        old = folder.with_name(f"{folder.name}-old")
        if out.exists():
            out.rename(old)
        try:
            folder.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        _remove(old)
        sync_directory(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_place(out: Path, replace: bool) -> None:
    if any(_is_a_runs_own(each) for each in (out, *out.parents)):
        raise UserError(f"{out}: lies within a run's checkpoints; choose another directory")
    there = out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir())))
    if there and not replace:
        raise UserError(f"{out}: is there already; choose another directory, or delete it")


def _is_a_runs_own(path: Path) -> bool:
    """Whether it is a checkpoint, or a run's folder of them: other folders may have such names."""
    if path.name == "checkpoints":
        return (path.parent / "recipe.toml").exists() or bool(list_steps(path.parent))
    return is_checkpoint(path) and (path / STATE_FILE).exists()


def sweep(out: Path) -> None:
    """Clear away what processes left that were killed while they made ``out``; what they had put
    out of the way comes back."""
    for left in out.parent.glob(f".{out.name}-*"):
        match = re.fullmatch(rf"\.{re.escape(out.name)}-(\d+)-\w+(-old)?", left.name)
        if match is None or Path(f"/proc/{match[1]}").exists():
            continue
        if match[2] and not out.exists():
            left.rename(out)
        else:
            _remove(left)


def _remove(path: Path) -> None:
    """A directory with what is in it; of a link, the link alone."""
    if path.is_symlink():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
