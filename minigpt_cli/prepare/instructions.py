"""Records of prompts and answers -> an instruction dataset, all of it or nothing.

Examples are encoded in the source's order into one pair of files; once the hash of each is known,
and so which are validation, they are copied into their splits. Everything happens in a directory
beside the dataset's, which takes its name at the end.
"""

import errno
import fcntl
import hashlib
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from minigpt_cli import __version__
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import sha256_of, sync_to_disk, write_atomically
from minigpt_cli.data.chat import check_template
from minigpt_cli.data.dataset_manifest import SPLITS, TOKENIZER, Shard
from minigpt_cli.data.instruction_dataset import (
    ARRAYS,
    ExampleFiles,
    InstructionManifest,
    array_type,
    is_instructions,
    open_instructions,
    write_instructions,
)
from minigpt_cli.data.tokenizer import (
    eos_id,
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from minigpt_cli.prepare.examples import Example, examples
from minigpt_cli.prepare.progress import BadLines
from minigpt_cli.prepare.sources import Source, listing
from minigpt_cli.prepare.tokenize import LOCK, differences
from minigpt_cli.prepare.writer import npy_header

_COPIED_AT_ONCE = 4096  # examples


def make_instructions(
    source: Source,
    out: str | Path,
    *,
    tokenizer_path: str | Path,
    chat_template: str | None,
    variables: dict[str, str],
    val_fraction: float,
    warn: Callable[[str], None],
) -> InstructionManifest:
    """Turn the records of ``source`` into an instruction dataset in the directory ``out``.

    A prompt and its completion become ids(prompt) + ids(completion) + end-of-text, of which the
    completion and the end are trained; special tokens in their text are text. Conversations are
    rendered with ``chat_template`` and ``variables`` (`chat.special_tokens`), whose special tokens
    are recognised; the assistant's messages are trained, and nothing is appended. An example's
    first token isn't trained, for nothing predicts it.

    About ``val_fraction`` of the examples become validation, at least one where there are two that
    differ: those with the smallest hashes of their ids, so that equal ones go together. ``warn`` is
    called with one line per malformed record (the first 20). A dataset that is there already, made
    with these settings, is returned at once; a killed call leaves nothing that the next one doesn't
    remove.

    Raises ``UserError`` when the settings or the source are wrong, no record is good,
    conversations come without a template, ``out`` holds something else, another process makes the
    same dataset, or the disk is full.
    """
    out = Path(out)
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction must be at least 0 and below 1, not {val_fraction}")
    tokenizer = load_tokenizer(tokenizer_path)
    if chat_template is not None:
        check_template(chat_template)
    end, vocab_size = eos_id(tokenizer), vocabulary_size(tokenizer)
    dtype = "uint16" if vocab_size <= 65_536 else "uint32"
    described = source.describe()
    kept = ("kind", "split", "config")  # a field's name says nothing here, a path not what is there
    settings: dict[str, Any] = {
        "source": {name: described[name] for name in kept if name in described},
        "source_files": listing(source)[0],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": None if chat_template is None else _digest(chat_template),
        "variables": dict(variables),
        "val_fraction": val_fraction,
    }
    bad = BadLines(warn)
    first_bad: list[str] = []

    def on_bad(message: str) -> None:
        if not first_bad:
            first_bad.append(message.removesuffix("; skipped"))
        bad(message)

    try:
        if is_instructions(out):
            return _finished(out, settings)
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} holds something else: choose another place, or delete it")
        with _workplace(out) as work:
            if is_instructions(out):  # another process made it just before this one held the lock
                return _finished(out, settings)
            found = examples(source, tokenizer, chat_template, variables, on_bad)
            splits = _write_splits(work, found, dtype, val_fraction)
            if splits is None:
                because = f"; all was skipped, for example {first_bad[0]}" if first_bad else ""
                raise UserError(f"no instructions found in {', '.join(source.path)}{because}")
            write_atomically(work / TOKENIZER, tokenizer.to_str(pretty=True).encode())
            manifest = InstructionManifest(
                splits=splits,
                eos_id=end,
                dtype=dtype,
                vocab_size=vocab_size,
                tokenizer_fingerprint=settings["tokenizer"],
                tokenizer_sha256=sha256_of(work / TOKENIZER),
                chat_template=chat_template,
                source=described,
                malformed=bad.count,
                settings=settings,
                minigpt_version=__version__,
            )
            write_instructions(work, manifest)
            work.rename(out)
            sync_to_disk(out.parent)
            (out / LOCK).unlink()
            return manifest
    except OSError as error:
        raise _os_problem(error, out) from None


def _write_splits(
    work: Path, found: Iterable[Example], dtype: str, val_fraction: float
) -> dict[str, ExampleFiles] | None:
    """Write the arrays of both splits; None when there is no example."""
    spools = (work / "tokens.spool", work / "trained.spool")
    types = (np.dtype(dtype).newbyteorder("<"), np.dtype(bool))
    lengths, counts, sizes, hashes = array("q"), array("q"), array("q"), array("Q")
    with spools[0].open("wb") as tokens, spools[1].open("wb") as trained:
        for example in found:
            tokens.write(example.tokens.astype(types[0]).tobytes())
            trained.write(example.trained.tobytes())
            lengths.append(len(example.tokens))
            counts.append(int(example.trained.sum()))
            sizes.append(example.trained_bytes)
            digest = hashlib.sha256(example.tokens.astype("<u4").tobytes()).digest()
            hashes.append(int.from_bytes(digest[:8]))
    if not lengths:
        return None
    spooled = [
        np.memmap(file, dtype=kind, mode="r") for file, kind in zip(spools, types, strict=True)
    ]
    size, count, text = (np.array(each, dtype=np.int64) for each in (lengths, counts, sizes))
    val = _held_out(np.array(hashes, dtype=np.uint64), val_fraction)
    splits = {}
    for name, mask in zip(SPLITS, (~val, val), strict=True):
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(size[mask], dtype=np.int64)])
        contents = (
            (int(offsets[-1]), _selected(spooled[0], size, mask)),
            (int(offsets[-1]), _selected(spooled[1], size, mask)),
            (len(offsets), [offsets]),
        )
        files = tuple(
            _save(work / f"{name}-{each}.npy", array_type(each, dtype), length, chunks)
            for each, (length, chunks) in zip(ARRAYS, contents, strict=True)
        )
        splits[name] = ExampleFiles(
            files=files,
            examples=int(mask.sum()),
            tokens=int(offsets[-1]),
            trained_tokens=int(count[mask].sum()),
            trained_bytes=int(text[mask].sum()),
        )
    for file in spools:
        file.unlink()
    return splits


def _held_out(hashes: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Return bool [n]: whether the example with this hash is validation."""
    distinct = np.unique(hashes)
    # At least one, but something must be left to train on
    wanted = min(max(1, round(len(distinct) * fraction)), len(distinct) - 1)
    if fraction == 0 or wanted == 0:
        return np.zeros(len(hashes), dtype=bool)
    return hashes <= distinct[wanted - 1]


def _selected(
    spooled: NDArray[Any], lengths: NDArray[np.int64], mask: NDArray[np.bool_]
) -> Iterator[NDArray[Any]]:
    """Yield, a part at a time, what belongs to the examples of ``mask``."""
    start = 0
    for first in range(0, len(lengths), _COPIED_AT_ONCE):
        part = slice(first, first + _COPIED_AT_ONCE)
        end = start + int(lengths[part].sum())
        yield spooled[start:end][np.repeat(mask[part], lengths[part])]
        start = end


def _save(file: Path, dtype: str, length: int, chunks: Iterable[NDArray[Any]]) -> Shard:
    """Write a 1-D .npy file of ``length`` entries, to the disk."""
    with file.open("wb") as stream:
        stream.write(npy_header(np.dtype(dtype), length))
        for chunk in chunks:
            stream.write(chunk.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
        stream.flush()
        os.fsync(stream.fileno())
    return Shard(file.name, length, file.stat().st_size, sha256_of(file))


def _finished(out: Path, settings: dict[str, Any]) -> InstructionManifest:
    """Return the dataset that is there; ``UserError`` when it was made with other settings."""
    manifest = open_instructions(out).manifest
    changed = differences(manifest.settings, settings)
    if changed:
        raise UserError(
            f"{out} holds instructions made with other settings ({'; '.join(changed)}): "
            "choose another place, or delete it"
        )
    return manifest


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """Hold an empty directory beside ``out``, which is removed unless it was renamed.

    The system lets go of it however the process ends; what a killed one left is removed here.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.parent / f".{out.name}.unfinished"
    work.mkdir(exist_ok=True)
    busy = UserError(
        f"another process is making {out}: wait for it, then run the same command again"
    )
    with (work / LOCK).open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        if not _is_file(stream, work / LOCK):  # it was renamed or removed before the lock was free
            raise busy
        try:
            for leftover in work.iterdir():
                if leftover.name != LOCK:
                    leftover.unlink()
            yield work
        finally:
            if _is_file(stream, work / LOCK):
                shutil.rmtree(work, ignore_errors=True)


def _is_file(stream: IO[Any], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _os_problem(error: OSError, out: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"the disk of {out} is full: free some space and run the same command again"
        )
    where = error.filename or out
    return UserError(f"can't write to {out}: {where}: {error.strerror}; choose another place")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
