"""Turn records of prompts and answers into a dataset, all of it or nothing.

Examples are encoded in the source's order into temporary files. Once the hash of each is known, and
so which ones are validation, they are copied into their splits. All of this happens in a directory
beside the dataset's, which is renamed at the end.
"""

import hashlib
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from minigpt_cli import __version__
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import (
    is_same_file,
    locked,
    removed_if_empty,
    sha256_of,
    sync_to_disk,
    write_atomically,
)
from minigpt_cli.data.chat import check_template
from minigpt_cli.data.dataset_manifest import (
    LOCK,
    SPLITS,
    TOKENIZER,
    DatasetManifest,
    Shard,
    Split,
    is_dataset,
    token_dtype,
    write_dataset_manifest,
)
from minigpt_cli.data.tokenizer import (
    eos_id,
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_size,
)
from minigpt_cli.prepare.examples import Example, examples
from minigpt_cli.prepare.output import (
    finished_dataset,
    remove_stale_lock,
    write_error,
)
from minigpt_cli.prepare.progress import BadLines
from minigpt_cli.prepare.sources import Source, listing
from minigpt_cli.prepare.writer import npy_header

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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
) -> DatasetManifest:
    """Turn the records of ``source`` into a dataset of instructions in the directory ``out``.

    `examples` says what a record becomes. The examples with the smallest hashes of their ids become
    validation, so equal ones go together.

    A dataset that is there already, made with the same settings, is returned at once. The next call
    removes what a killed call left.

    Args:
        source: JSON lines, Parquet, or a Hugging Face dataset.
        out: a new or empty directory.
        tokenizer_path: see `load_tokenizer`.
        chat_template: renders conversations. None: a conversation is an error.
        variables: what the template may use besides the messages, see `chat.special_tokens`.
        val_fraction: about this share of the examples becomes validation; at least one example,
            where two or more differ.
        warn: called with one line for each of the first 20 malformed records, which are skipped.

    Returns:
        The dataset's manifest.

    Raises:
        UserError: the settings or the source are wrong, no record is good, a conversation comes
            without a template, ``out`` holds something else, another process makes the same
            dataset, or the disk is full.
        Damaged: the dataset that is there already isn't as recorded.
    """
    out = Path(out)
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction must be at least 0 and below 1, not {val_fraction}")
    tokenizer = load_tokenizer(tokenizer_path)
    if chat_template is not None:
        check_template(chat_template)
    settings = _settings(source, tokenizer, chat_template, variables, val_fraction)
    bad = BadLines(warn)
    first_bad: list[str] = []

    def on_bad(message: str) -> None:
        if not first_bad:
            first_bad.append(message.removesuffix("; skipped"))
        bad(message)

    try:
        if is_dataset(out):
            return finished_dataset(out, settings, instructions=True)
        remove_stale_lock(out)
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(
                f"{out} holds something else: choose another "
                "directory (data.path in a recipe), or delete it"
            )
        with _work_directory(out) as work:
            if is_dataset(out):  # another process made it just before this one held the lock
                return finished_dataset(out, settings, instructions=True)
            dtype = token_dtype(vocabulary_size(tokenizer))
            found = examples(source, tokenizer, chat_template, variables, on_bad)
            splits = _write_splits(work, found, dtype, val_fraction)
            if splits is None:
                because = f"; everything was skipped, first {first_bad[0]}" if first_bad else ""
                raise UserError(f"no instructions found in {', '.join(source.path)}{because}")
            write_atomically(work / TOKENIZER, tokenizer.to_str(pretty=True).encode())
            manifest = DatasetManifest(
                splits=splits,
                eos_id=eos_id(tokenizer),
                dtype=dtype,
                vocab_size=vocabulary_size(tokenizer),
                tokenizer_fingerprint=settings["tokenizer"],
                tokenizer_sha256=sha256_of(work / TOKENIZER),
                source=source.describe(),
                source_fingerprint="",
                bad_lines=bad.count,
                settings=settings,
                minigpt_version=__version__,
                chat_template=chat_template,
            )
            _finish(work, out, manifest)
            return manifest
    except OSError as error:
        raise write_error(error, out) from None


def _settings(
    source: Source,
    tokenizer: "Tokenizer",
    chat_template: str | None,
    variables: dict[str, str],
    val_fraction: float,
) -> dict[str, Any]:
    """Return what tells whether a dataset that is there was made by the same call."""
    eos_id(tokenizer)  # refused now rather than after the source was read
    described = source.describe()
    kept = ("kind", "split", "config")  # the path and the field's name don't change the content
    return {
        "source": {name: described[name] for name in kept if name in described},
        "source_files": listing(source)[0],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "chat_template": None if chat_template is None else _digest(chat_template),
        "variables": dict(variables),
        "val_fraction": val_fraction,
    }


def _finish(work: Path, out: Path, manifest: DatasetManifest) -> None:
    """Write the manifest and give the work directory its name."""
    write_dataset_manifest(work, manifest)
    work.rename(out)
    sync_to_disk(out.parent)
    (out / LOCK).unlink()


def _write_splits(
    work: Path, found: Iterable[Example], dtype: str, val_fraction: float
) -> dict[str, Split] | None:
    """Write the arrays of both splits. Return None if there is no example."""
    spools = (work / "tokens.spool", work / "loss-mask.spool")
    types = (np.dtype(dtype).newbyteorder("<"), np.dtype(bool))
    lengths, counts, sizes, hashes = array("q"), array("q"), array("q"), array("Q")
    with spools[0].open("wb") as tokens, spools[1].open("wb") as loss_mask:
        for example in found:
            tokens.write(example.tokens.astype(types[0]).tobytes())
            loss_mask.write(example.loss_mask.tobytes())
            lengths.append(len(example.tokens))
            counts.append(int(example.loss_mask.sum()))
            sizes.append(example.bytes)
            digest = hashlib.sha256(example.tokens.astype("<u4").tobytes()).digest()
            hashes.append(int.from_bytes(digest[:8]))
    if not lengths:
        return None
    all_tokens, all_masks = (
        np.memmap(file, dtype=kind, mode="r") for file, kind in zip(spools, types, strict=True)
    )
    size, count, text = (np.array(each, dtype=np.int64) for each in (lengths, counts, sizes))
    val = _held_out(np.array(hashes, dtype=np.uint64), val_fraction)
    splits = {}
    for name, mask in zip(SPLITS, (~val, val), strict=True):
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(size[mask], dtype=np.int64)])
        total = int(offsets[-1])
        shard = _save(work / f"{name}-00000.npy", dtype, total, _selected(all_tokens, size, mask))
        splits[name] = Split(
            shards=(shard,),
            tokens=total,
            documents=int(mask.sum()),
            bytes=int(text[mask].sum()),
            loss_mask=_save(
                work / f"{name}-loss-mask.npy", "bool", total, _selected(all_masks, size, mask)
            ),
            offsets=_save(work / f"{name}-offsets.npy", "int64", len(offsets), [offsets]),
            loss_tokens=int(count[mask].sum()),
        )
    for file in spools:
        file.unlink()
    return splits


def _held_out(hashes: NDArray[np.uint64], fraction: float) -> NDArray[np.bool_]:
    """Return bool [n]: True if the example with this hash is validation."""
    distinct = np.unique(hashes)
    # At least one, but one must be left for training
    wanted = min(max(1, round(len(distinct) * fraction)), len(distinct) - 1)
    if fraction == 0 or wanted == 0:
        return np.zeros(len(hashes), dtype=bool)
    return hashes <= distinct[wanted - 1]


def _selected(
    spooled: NDArray[Any], lengths: NDArray[np.int64], mask: NDArray[np.bool_]
) -> Iterator[NDArray[Any]]:
    """Yield the entries that belong to the examples of ``mask``, a part at a time."""
    start = 0
    for first in range(0, len(lengths), _COPIED_AT_ONCE):
        part = slice(first, first + _COPIED_AT_ONCE)
        end = start + int(lengths[part].sum())
        yield spooled[start:end][np.repeat(mask[part], lengths[part])]
        start = end


def _save(file: Path, dtype: str, length: int, chunks: Iterable[NDArray[Any]]) -> Shard:
    """Write a 1-D .npy file of ``length`` entries and flush it to disk."""
    with file.open("wb") as stream:
        stream.write(npy_header(np.dtype(dtype), length))
        for chunk in chunks:
            stream.write(chunk.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
        stream.flush()
        os.fsync(stream.fileno())
    return Shard(file.name, length, file.stat().st_size, sha256_of(file))


@contextmanager
def _work_directory(out: Path) -> Iterator[Path]:
    """Lock an empty directory beside ``out``; remove it at the end, unless it was renamed.

    The system releases the lock however the process ends. The next call empties the directory that
    a killed one left.
    """
    work = out.parent / f".{out.name}.unfinished"
    busy = f"another process is making {out}: wait for it, then run the same command again"
    with removed_if_empty(out.parent):
        work.mkdir(parents=True, exist_ok=True)
        with locked(work / LOCK, busy) as stream:
            try:
                for leftover in work.iterdir():
                    if leftover.name != LOCK:
                        leftover.unlink()
                yield work
            finally:
                if is_same_file(stream, work / LOCK):
                    shutil.rmtree(work, ignore_errors=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
