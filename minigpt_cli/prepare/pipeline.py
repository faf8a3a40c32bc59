"""Read the source, encode it in worker processes, and write the shards.

This process reads, assigns documents to splits, and writes. Batches come back in the order in which
they were read. So the written bytes depend on the source and the settings alone, not on the number
of workers, nor on how often the work was killed.
"""

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from minigpt_cli.data.dataset_manifest import SPLITS, TOKENIZER, token_dtype
from minigpt_cli.prepare.encode import LAST, VAL, Ids, TextBatch, encoders
from minigpt_cli.prepare.journal import Journal, State, write_journal
from minigpt_cli.prepare.progress import BadLines, ProgressReporter
from minigpt_cli.prepare.sources import Source
from minigpt_cli.prepare.split import SplitPosition, assign_splits
from minigpt_cli.prepare.split_rule import SplitRule
from minigpt_cli.prepare.writer import ShardWriter

_BATCH_BYTES = 512 << 10
_BATCH_PIECES = 4096
_JOURNAL_SECONDS = 5.0


@dataclass(frozen=True)
class Work:
    """One tokenization: the part that stays the same, over restarts too.

    Attributes:
        source: where the documents come from.
        out: the dataset's directory.
        strict: refuse bad lines instead of skipping them.
        settings: what a call must have in common with an earlier one to continue its work.
        rule: how documents are assigned to splits.
        source_modified: last modification of the source (ns since the epoch), None for a Hugging
            Face dataset.
        tokenizer_fingerprint: of the tokenizer in ``out``.
        eos_id: id of its end-of-text token.
        vocab_size: its largest id plus one.
    """

    source: Source
    out: Path
    strict: bool
    settings: dict[str, Any]
    rule: SplitRule
    source_modified: int | None
    tokenizer_fingerprint: str
    eos_id: int
    vocab_size: int

    @property
    def dtype(self) -> str:
        """Data type of the token ids."""
        return token_dtype(self.vocab_size)

    def journal(self, state: State) -> None:
        """Record ``state``. Everything that it counts as written must be on disk already."""
        write_journal(
            self.out,
            Journal(
                self.settings, self.source_modified, self.tokenizer_fingerprint, self.rule, state
            ),
        )


def encode_all(
    work: Work, state: State, workers: int, reporter: ProgressReporter, warn: Callable[[str], None]
) -> State:
    """Read, encode and write everything from ``state`` on.

    Args:
        work: what to do.
        state: where to start.
        workers: processes that encode.
        reporter: told after each batch.
        warn: called with one line for each of the first bad lines.

    Returns:
        The state at the end.
    """
    reporter.begin("tokenizing", sum(state.bytes))
    bad_before = state.place.position.bad
    bad = BadLines(warn)
    writers = tuple(
        ShardWriter(work.out, split, work.dtype, work.settings["shard_tokens"], finished, pending)
        for split, finished, pending in zip(SPLITS, state.shards, state.pending, strict=True)
    )
    _remove_strays(work.out, state)
    waiting: deque[tuple[State, Future[Ids]]] = deque()
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
        if state.shards != before or time.monotonic() > journaled + _JOURNAL_SECONDS:
            for writer in writers:
                writer.sync()
            work.journal(state)
            journaled = time.monotonic()
        reporter.written(state)

    try:
        with encoders(workers, work.out / TOKENIZER, work.eos_id, work.dtype) as submit:
            for batch, reached in _batches(work, state, bad):
                waiting.append((reached, submit(batch)))
                if len(waiting) > 3 * workers:  # enough to keep every worker busy
                    write_oldest()
            while waiting:
                write_oldest()
        shards = tuple(writer.finish() for writer in writers)
    finally:
        for writer in writers:
            writer.close()
    # No position covers bad lines after the last document
    position = state.place.position._replace(bad=bad_before + bad.count)
    return replace(
        state, shards=shards, pending=(0, 0), place=state.place._replace(position=position)
    )


def _batches(
    work: Work, state: State, on_bad: Callable[[str], None]
) -> Iterator[tuple[TextBatch, State]]:
    """Yield batches of about ``_BATCH_BYTES``, each with the state after it is written.

    The written bytes don't depend on where batches end.
    """
    pieces: list[bytes] = []
    flags = bytearray()
    size = 0
    chain = bytes.fromhex(state.chain)
    counts, sizes = list(state.documents), list(state.bytes)
    place: SplitPosition | None = state.place
    for piece in assign_splits(work.source, work.rule, work.strict, on_bad, state.place):
        # Batches end where reading can start
        if (
            pieces
            and place is not None
            and (size + len(piece.data) > _BATCH_BYTES or len(pieces) >= _BATCH_PIECES)
        ):
            yield TextBatch(tuple(pieces), bytes(flags)), _reached(place, chain, counts, sizes)
            pieces, flags, size = [], bytearray(), 0
        pieces.append(piece.data)
        flags.append((LAST if piece.last else 0) | (VAL if piece.val else 0))
        size += len(piece.data)
        if piece.mark is not None:
            chain = hashlib.sha256(chain + piece.mark).digest()
        counts[piece.val] += piece.last
        sizes[piece.val] += len(piece.data)
        place = piece.after
    if pieces:
        assert place is not None
        yield TextBatch(tuple(pieces), bytes(flags)), _reached(place, chain, counts, sizes)


def _reached(place: SplitPosition, chain: bytes, counts: list[int], sizes: list[int]) -> State:
    return State(place, chain.hex(), (counts[0], counts[1]), (sizes[0], sizes[1]))


def shard_files(out: Path) -> list[Path]:
    """Return all files with tokens in ``out``, finished or not."""
    return sorted(file for split in SPLITS for file in out.glob(f"{split}-[0-9]*.npy*"))


def _remove_strays(out: Path, state: State) -> None:
    """Delete the shards that ``state`` doesn't know: they were written after the last journal."""
    kept = set()
    for split, shards, pending in zip(SPLITS, state.shards, state.pending, strict=True):
        kept |= {shard.file for shard in shards}
        if pending:
            kept.add(f"{split}-{len(shards):05d}.npy.partial")
    for file in shard_files(out):
        if file.name not in kept:
            file.unlink()
