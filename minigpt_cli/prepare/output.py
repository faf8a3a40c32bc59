"""The directory that a dataset is made in: what it holds already, and errors on writing to it."""

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import locked, removed_if_empty
from minigpt_cli.data.dataset import open_dataset
from minigpt_cli.data.dataset_manifest import (
    JOURNAL,
    LOCK,
    SPLITS,
    TEMPORARY,
    TOKENIZER,
    DatasetManifest,
    is_dataset,
)

_OURS = re.compile(rf"({'|'.join(SPLITS)})-\d+\.npy(\.partial)?")
_NAMES = (LOCK, TOKENIZER, JOURNAL, *TEMPORARY)


@contextlib.contextmanager
def locked_directory(out: Path, busy: str) -> Iterator[None]:
    """Make the directory ``out`` and lock it; remove both if the work fails before its journal.

    Args:
        out: a new directory, an empty one, or one that holds a dataset, finished or not.
        busy: the message of the error if another process holds the lock.

    Raises:
        UserError: ``out`` holds something else, or another process works there.
        OSError: it can't be written to.
    """
    refuse_foreign_files(out)
    with removed_if_empty(out):
        out.mkdir(parents=True, exist_ok=True)
        had_lock = (out / LOCK).exists()
        with locked(out / LOCK, busy):
            try:
                yield
            except BaseException:
                if not had_lock or (not (out / JOURNAL).exists() and not is_dataset(out)):
                    (out / LOCK).unlink()
                raise


def remove_stale_lock(out: Path) -> None:
    """Remove the lock file that earlier versions left after a failed start, if it is all there is.

    Raises:
        UserError: another process holds the lock.
    """
    if out.is_dir() and [file.name for file in out.iterdir()] == [LOCK]:
        with locked(out / LOCK, f"another process is tokenizing into {out}: wait for it"):
            (out / LOCK).unlink()


def refuse_foreign_files(out: Path) -> None:
    """Refuse a directory that holds files which are not a dataset's.

    Raises:
        UserError: it does.
    """
    if not out.is_dir():
        return
    for file in sorted(out.iterdir()):
        if file.name not in _NAMES and not _OURS.fullmatch(file.name) and not is_dataset(out):
            raise UserError(
                f"{out}: holds {file.name}, which is not a file of a dataset: choose a new or an "
                "empty directory"
            )


def finished_dataset(out: Path, settings: dict[str, Any], *, instructions: bool) -> DatasetManifest:
    """Return the manifest of the dataset that ``out`` holds already.

    Args:
        out: the dataset's directory.
        settings: those that the dataset must have been made with.
        instructions: True if it must hold instructions, False if it must hold text.

    Raises:
        UserError: the dataset is another one.
        Damaged: a file isn't as recorded.
    """
    manifest = open_dataset(out).manifest
    if manifest.has_loss_mask != instructions:
        found = "instructions" if manifest.has_loss_mask else "text"
        raise UserError(
            f"{out} holds a dataset of {found}: choose another "
            "directory (data.path in a recipe), or delete it"
        )
    then = dict(manifest.settings)
    if settings["tokenizer"] == manifest.tokenizer_fingerprint:
        then["tokenizer"] = settings["tokenizer"]  # the very tokenizer that was trained here
    changed = differences(then, settings)
    if changed:
        raise UserError(
            f"{out} holds a dataset made with other settings ({'; '.join(changed)}): "
            "choose another directory (data.path in a recipe), or delete it"
        )
    return manifest


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Describe each setting that differs between an earlier command and this one."""
    found = []
    for name in sorted(then.keys() | now.keys()):
        before, after = then.get(name), now.get(name)
        if before == after:
            continue
        if name == "source_files":
            found.append("the source's files have other names or sizes")
        elif name == "tokenizer":
            found.append(f"tokenizer: {str(before)[:12]} -> {str(after)[:12]}")
        else:
            found.append(f"{name}: {before!s:.80} -> {after!s:.80}")
    return found


def write_error(error: OSError, out: Path) -> UserError:
    """Return the error to show when ``out`` can't be written to."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk of {out} is full: free some space and run the same command again"
        )
    where = error.filename or out
    return UserError(f"can't write to {out}: {where}: {error.strerror}; choose another directory")
