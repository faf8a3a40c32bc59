"""Documents -> a token dataset: bounded memory, all cores, restartable at any moment.

The main process reads, places each document into a split and writes; workers encode. Batches come back in
order, so the bytes written depend on the source and the settings alone: not on the number of workers, and
not on how often the work was killed. ``journal.json`` says how far the shards on disk go.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minigpt_cli import __version__
from minigpt_cli.data.documents import documents
from minigpt_cli.data.encode import LAST, VAL, Batch, Ids, encoders
from minigpt_cli.data.manifest import (
    FORMAT,
    JOURNAL,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    Shard,
    Split,
    sha256_of,
    write_atomically,
    write_manifest,
)
from minigpt_cli.data.placement import Place, Placed, Rule, choose_rule, placed
from minigpt_cli.data.shard_writer import ShardWriter
from minigpt_cli.data.shards import open_dataset
from minigpt_cli.data.sources import Source, listing
from minigpt_cli.data.tokenizer import (
    eos_id,
    fingerprint,
    load_tokenizer,
    train_bpe,
    vocabulary_size,
)
from minigpt_cli.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LOCK = ".lock"

_BATCH_BYTES = 512 << 10
_BATCH_PIECES = 4096
_JOURNAL_SECONDS = 5.0
_REPORTED_BAD = 20
_SPACE_KEPT = 64 << 20


@dataclass(frozen=True)
class Progress:
    """Where a tokenization is.

    ``phase``: "training the tokenizer" or "tokenizing". ``bytes`` of UTF-8 text, ``documents``, ``tokens``
    and ``bad`` lines so far, of which ``resumed_bytes`` were done by an earlier, interrupted run;
    ``total_bytes`` when the source's size tells (None: unknown); ``seconds`` since this run began.
    """

    phase: str
    bytes: int = 0
    total_bytes: int | None = None
    documents: int = 0
    tokens: int = 0
    bad: int = 0
    resumed_bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _State:
    """How far the shards go: what the journal holds, apart from the settings. Plain JSON values.

    ``chain`` is the running fingerprint of the text: sha256 of (the previous value, the sha256 of a piece),
    hex. Unlike a hash that is still being fed, it can be written down and taken up again.
    """

    place: Place = Place()
    chain: str = ""
    documents: tuple[int, int] = (0, 0)  # in the order of SPLITS, as the others
    bytes: tuple[int, int] = (0, 0)
    shards: tuple[tuple[Shard, ...], tuple[Shard, ...]] = ((), ())
    pending: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shards in self.shards for shard in shards) + sum(self.pending)


@dataclass(frozen=True)
class _Work:
    """What stays the same from the start to the end, and over restarts."""

    source: Source
    out: Path
    settings: dict[str, Any]
    rule: Rule
    tokenizer: "Tokenizer"
    strict: bool
    shard_tokens: int

    @property
    def dtype(self) -> str:
        return "uint16" if vocabulary_size(self.tokenizer) <= 65_536 else "uint32"


def tokenize(
    source: Source,
    out: str | Path,
    *,
    tokenizer_path: str | Path | None = None,
    train_vocab: int | None = None,
    val_fraction: float = 0.05,
    shard_tokens: int = 100_000_000,
    strict: bool = False,
    workers: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Manifest:
    """Turn ``source`` into a token dataset in the directory ``out``; return what it holds.

    Exactly one of ``tokenizer_path`` (see `load_tokenizer`) and ``train_vocab`` (train a BPE tokenizer of that
    size on the training documents) is given. Every document ends with the end-of-text id. About
    ``val_fraction`` of the documents become validation, by a hash of their text; a single document is cut
    near its end instead (see `placement.py`). ``workers`` defaults to the cores this process may use.
    ``progress`` is called after every batch, ``warn`` with one line per bad line (the first 20) and notice;
    by default warnings go to standard error.

    Killed at any moment, the same call goes on where it was and gives the same bytes. A dataset that is
    complete with these settings is returned at once.

    Raises ``UserError`` when the settings or the source are wrong, ``out`` holds a dataset made with other
    settings, another process works in it, or the disk is full; ``Damaged`` when finished shards were changed.
    """
    out = Path(out)
    _check_arguments(tokenizer_path, train_vocab, val_fraction, shard_tokens, workers)
    warn = warn or _to_stderr
    given = None if tokenizer_path is None else load_tokenizer(tokenizer_path)
    if given is not None:
        eos_id(given)  # refused now rather than after a survey of the corpus
    names_and_sizes, total_bytes = listing(source)
    settings = {
        "source": {key: value for key, value in source.describe().items() if key != "path"},
        "source_files": names_and_sizes,
        "tokenizer": fingerprint(given) if given else f"bpe-{train_vocab}",
        "val_fraction": val_fraction,
        "shard_tokens": shard_tokens,
    }
    tell = _Teller(progress, total_bytes)
    try:
        if (out / MANIFEST).exists():  # before the lock: a dataset may lie on a read-only disk
            return _finished(out, settings)
        with _locked(out):
            if (out / MANIFEST).exists():
                return _finished(out, settings)
            work, state = _resumed(source, out, settings, strict, warn) or _begun(
                source, out, settings, strict, given, train_vocab, tell
            )
            state = _encode(work, state, workers or _cores(), tell, warn)
            return _completed(work, state)
    except OSError as error:
        raise _os_problem(error, out) from None


def _begun(
    source: Source,
    out: Path,
    settings: dict[str, Any],
    strict: bool,
    given: "Tokenizer | None",
    train_vocab: int | None,
    tell: "_Teller",
) -> tuple[_Work, _State]:
    """Choose what is validation, make the tokenizer, write the first journal."""
    strays = _shard_files(out)
    if strays and not (out / JOURNAL).exists():
        raise UserError(
            f"{out} holds {strays[0].name} but neither {MANIFEST} nor {JOURNAL}: "
            "choose another --out, or delete it"
        )
    rule = choose_rule(source, strict, settings["val_fraction"])
    tokenizer = given
    if tokenizer is None:
        assert train_vocab is not None
        texts = _training_texts(source, rule, strict, tell)
        tokenizer = train_bpe(texts, train_vocab)
    file = out / TOKENIZER
    if given is None or not _holds(file, given):
        write_atomically(file, tokenizer.to_str(pretty=True).encode())
    work = _Work(source, out, settings, rule, tokenizer, strict, settings["shard_tokens"])
    _write_journal(work, _State())
    return work, _State()


def _resumed(
    source: Source,
    out: Path,
    settings: dict[str, Any],
    strict: bool,
    warn: Callable[[str], None],
) -> tuple[_Work, _State] | None:
    """Return where an interrupted run was; None when there is none."""
    file = out / JOURNAL
    if not file.exists():
        return None
    anew = f"delete {out} to begin anew"
    try:
        record = json.loads(file.read_text())
        state = _state_from(record["state"])
        rule = Rule(**record["rule"] | {"digests": tuple(record["rule"]["digests"])})
        settings_then, modified_then = record["settings"], record["source_modified"]
        fingerprint_then = record["tokenizer_fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{file} can't be read ({error!r}): {anew}") from None
    changed = _differences(settings_then, settings)
    if not changed and modified_then != _modified(source):
        changed = ["the source's files were written since"]
    if changed and not state.tokens:
        warn(f"{out}: beginning anew, with other settings ({'; '.join(changed)})")
        return None
    if changed:
        raise UserError(
            f"{out} holds an unfinished dataset with other settings ({'; '.join(changed)}): "
            f"run it with the same settings to go on, choose another --out, or {anew}"
        )
    tokenizer = load_tokenizer(out / TOKENIZER)
    if fingerprint(tokenizer) != fingerprint_then:
        raise Damaged(f"{out / TOKENIZER} was changed since the work began: {anew}")
    for shard in (shard for shards in state.shards for shard in shards):
        problem = shard_problem(out / shard.file, shard)
        if problem:
            raise Damaged(f"{out / shard.file}: {problem}; {anew}")
    if state.tokens:
        warn(f"{out}: going on after {sum(state.documents):,} documents, {state.tokens:,} tokens")
    work = _Work(source, out, settings, rule, tokenizer, strict, settings["shard_tokens"])
    return work, state


def _encode(
    work: _Work, state: _State, workers: int, tell: "_Teller", warn: Callable[[str], None]
) -> _State:
    """Read, encode and write everything from ``state`` on; return the state at the end."""
    tell.begin("tokenizing", sum(state.bytes))
    bad_before = state.place.position.bad
    bad = _BadLines(warn)
    writers = tuple(
        ShardWriter(work.out, split, work.dtype, work.shard_tokens, finished, pending)
        for split, finished, pending in zip(SPLITS, state.shards, state.pending, strict=True)
    )
    _remove_strays(work.out, state)
    waiting: deque[tuple[_State, Future[Ids]]] = deque()
    journaled = time.monotonic()

    def write_oldest() -> None:
        nonlocal state, journaled
        reached, future = waiting.popleft()
        for writer, raw in zip(writers, future.result(), strict=True):
            writer.write(np.frombuffer(raw, dtype=work.dtype))
        before = state.shards
        state = replace(
            reached,
            shards=tuple(tuple(writer.finished) for writer in writers),
            pending=tuple(writer.pending for writer in writers),
        )
        tell(state)
        if state.shards != before or time.monotonic() > journaled + _JOURNAL_SECONDS:
            for writer in writers:
                writer.sync()
            _write_journal(work, state)
            journaled = time.monotonic()

    eos = eos_id(work.tokenizer)
    try:
        with encoders(workers, work.out / TOKENIZER, eos, work.dtype) as submit:
            for batch, reached in _batches(work, state, bad):
                waiting.append((reached, submit(batch)))
                if len(waiting) > 2 * workers:  # each busy, and as many batches at hand
                    write_oldest()
            while waiting:
                write_oldest()
        shards = tuple(writer.finish() for writer in writers)
    finally:
        for writer in writers:
            writer.close()
    # Lines after the last document belong to no position
    position = state.place.position._replace(bad=bad_before + bad.count)
    return replace(
        state, shards=shards, pending=(0, 0), place=state.place._replace(position=position)
    )


def _batches(work: _Work, state: _State, on_bad: Callable[[str], None]) -> Iterator[tuple[Batch, _State]]:
    """Yield batches of about ``_BATCH_BYTES``, each with the state once it is written.

    Which pieces share a batch has no influence on what is written.
    """
    pieces: list[bytes] = []
    flags = bytearray()
    size = 0
    chain = bytes.fromhex(state.chain)
    counts, sizes = list(state.documents), list(state.bytes)
    place = state.place
    for piece in placed(work.source, work.rule, work.strict, on_bad, state.place):
        # A new batch begins where reading could
        if pieces and place is not None and (size + len(piece.data) > _BATCH_BYTES or len(pieces) >= _BATCH_PIECES):
            yield Batch(tuple(pieces), bytes(flags)), _reached(place, chain, counts, sizes)
            pieces, flags, size = [], bytearray(), 0
        pieces.append(piece.data)
        flags.append((LAST if piece.last else 0) | (VAL if piece.val else 0))
        size += len(piece.data)
        chain = hashlib.sha256(chain + piece.digest).digest()
        counts[piece.val] += piece.last
        sizes[piece.val] += len(piece.data)
        place = piece.after
    if pieces:
        assert place is not None
        yield Batch(tuple(pieces), bytes(flags)), _reached(place, chain, counts, sizes)


def _reached(place: Place, chain: bytes, counts: list[int], sizes: list[int]) -> _State:
    return _State(place, chain.hex(), (counts[0], counts[1]), (sizes[0], sizes[1]))


def _completed(work: _Work, state: _State) -> Manifest:
    """Write ``dataset.json``."""
    splits = {
        name: Split(shards, sum(shard.tokens for shard in shards), documents, size)
        for name, shards, documents, size in zip(
            SPLITS, state.shards, state.documents, state.bytes, strict=True
        )
    }
    if not splits["train"].tokens:
        raise UserError(
            f"all {splits['val'].documents} documents fell to validation; lower val_fraction"
        )
    manifest = Manifest(
        splits=splits,
        eos_id=eos_id(work.tokenizer),
        dtype=work.dtype,
        vocab_size=vocabulary_size(work.tokenizer),
        tokenizer_fingerprint=fingerprint(work.tokenizer),
        tokenizer_sha256=sha256_of(work.out / TOKENIZER),
        source=work.source.describe(),
        source_fingerprint=state.chain,
        bad_lines=state.place.position.bad,
        settings=work.settings,
        minigpt_version=__version__,
    )
    write_manifest(work.out, manifest)
    (work.out / JOURNAL).unlink()
    return manifest


def _finished(out: Path, settings: dict[str, Any]) -> Manifest:
    """Return the complete dataset that is there; ``UserError`` when it was made with other settings."""
    manifest = open_dataset(out).manifest
    then = dict(manifest.settings)
    if settings["tokenizer"] == manifest.tokenizer_fingerprint:
        then["tokenizer"] = settings["tokenizer"]  # the very tokenizer that was trained here
    changed = _differences(then, settings)
    if changed:
        raise UserError(
            f"{out} holds a dataset with other settings ({'; '.join(changed)}): "
            "choose another --out, or delete it"
        )
    return manifest


def _training_texts(
    source: Source, rule: Rule, strict: bool, tell: "_Teller"
) -> Iterator[str]:
    tell.begin("training the tokenizer")
    size = documents = 0
    # What is skipped here is told, and counted, when it is read to be encoded.
    for piece in placed(source, rule, strict, None, Place()):
        size += len(piece.data)
        documents += piece.last
        if not piece.val:
            yield piece.data.decode()
            tell.read(size, documents)


def _write_journal(work: _Work, state: _State) -> None:
    record = {
        "format": FORMAT,
        "settings": work.settings,
        "source_modified": _modified(work.source),
        "tokenizer_fingerprint": work.fingerprint,
        "rule": asdict(work.rule),
        "state": asdict(state),
    }
    write_atomically(work.out / JOURNAL, json.dumps(record).encode())


def _state_from(record: dict[str, Any]) -> _State:
    position, val = record["place"]
    train, held_out = (tuple(Shard(**shard) for shard in shards) for shards in record["shards"])
    return _State(
        Place(Position(*position), val),
        record["chain"],
        tuple(record["documents"]),
        tuple(record["bytes"]),
        (train, held_out),
        tuple(record["pending"]),
    )
