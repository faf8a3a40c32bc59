"""Choose which part of a source is validation: ``val_fraction`` of its bytes, within a tenth.

The source is read once to measure its documents. Their sizes decide between two rules:

- bytes: the documents with the smallest hashes are validation, as many as give the bytes asked for;
- tails: where the largest document has more than a tenth of those bytes, the end of each document
  is validation (as in nanoGPT, for one document). A short document gives its end every few times.

The hash is the sha256 of the document's UTF-8 bytes. A document longer than ``LONG_DOCUMENT`` bytes
is read in pieces, and its split must be known before its end is read: the first piece is hashed.

A dataset on the Hub is measured up to ``_SURVEYED`` bytes only. If it is larger, its rule is
"hash": each document whose hash is below ``val_fraction`` is validation.
"""

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minigpt_cli.core.errors import UserError
from minigpt_cli.prepare.documents import documents
from minigpt_cli.prepare.pieces import SEARCHED
from minigpt_cli.prepare.sources import Source, local_folder

RULES = ("bytes", "tails", "hash", "smallest", "tail")  # the last two of earlier versions

_SURVEYED = 64 << 20
_BUCKET_BITS = 20  # hashes are counted in this many bits: 8 MB for a corpus of any size
_SHORTEST_TAIL = 256  # bytes, so that validation holds sentences where there are enough of them


@dataclass(frozen=True)
class SplitRule:
    """The rule that assigns the documents of a source to splits.

    Attributes:
        name: "bytes", "tails" or "hash". Journals of earlier versions have "hash", "smallest" or
            "tail".
        val_fraction: The share of the source that becomes validation.
        digests: The sha256 (hex) of the validation documents; for "smallest" only.
        cut_at: The bytes of the only document that are for training; for "tail" only.
        end: Documents whose `hash_bucket` is below it are validation; for "bytes" only.
        skipped: The buckets below ``end`` that stay in training, because equal documents make them
            large; for "bytes" only.
        tolerance: A document is cut at most this many bytes before the wanted place, and a tail is
            not shorter; for "tails" only.
        long_sizes: The bytes of each document that is read in several pieces; for "tails" only.
        total_bytes: The bytes of all documents; 0 if they were not measured.
    """

    name: str
    val_fraction: float
    digests: tuple[str, ...] = ()
    cut_at: int = 0
    end: int = 0
    skipped: tuple[int, ...] = ()
    tolerance: int = SEARCHED
    long_sizes: tuple[int, ...] = ()
    total_bytes: int = 0

    @property
    def is_of_earlier_version(self) -> bool:
        """Whether an earlier version of minigpt chose it for local files, without measuring all."""
        return self.name in ("smallest", "tail") or (self.name == "hash" and not self.total_bytes)

    @property
    def shortest_tail(self) -> int:
        """The fewest bytes that are cut off a document, except off a shorter one."""
        return max(1, min(_SHORTEST_TAIL, self.tolerance))


def hash_bucket(digest: bytes) -> int:
    """Return the first bits of a document's sha256, as a number."""
    return int.from_bytes(digest[:8]) >> (64 - _BUCKET_BITS)


def choose_split_rule(
    source: Source,
    strict: bool,
    val_fraction: float,
    progress: Callable[[int, int], None] | None = None,
) -> SplitRule:
    """Measure a source, and choose its rule. Every file is checked to be text on the way.

    Args:
        source: What to read.
        strict: Refuse bad text, as in ``documents``.
        val_fraction: The share of the bytes for validation, at least 0 and below 1.
        progress: Called with the bytes and the documents so far.

    Raises:
        UserError: The source has no text, or can't be read.
    """
    first_bad: list[str] = []

    def on_bad(message: str) -> None:
        if not first_bad:
            first_bad.append(message.removesuffix("; skipped"))

    is_remote = source.kind == "huggingface" and local_folder(source) is None
    buckets = array("q", bytes(8 << _BUCKET_BITS))
    long_sizes = array("q")
    bucket = total = largest = count = size = 0
    is_long = False
    for piece in documents(source, strict, on_bad):
        if not size:
            if is_remote and count and (total > _SURVEYED or val_fraction == 0):
                return SplitRule("hash", val_fraction)
            bucket = hash_bucket(hashlib.sha256(piece.data).digest())
            is_long = not piece.last
        size += len(piece.data)
        if not piece.last:
            continue
        count += 1
        total += size
        largest = max(largest, size)
        buckets[bucket] += size
        if is_long:
            long_sizes.append(size)
        size = 0
        if progress is not None and not count % 1024:
            progress(total, count)
    if count == 0:
        where = ", ".join(source.path) or source.kind
        example = f"; everything was skipped, first {first_bad[0]}" if first_bad else ""
        raise UserError(f"no text found in {where}{example}")
    if val_fraction == 0:
        return SplitRule("hash", 0, total_bytes=total)
    wanted = total * val_fraction
    if largest <= wanted / 10:
        found = _smallest_hashes(np.frombuffer(buckets, dtype=np.int64), wanted)
        if found is not None:
            end, skipped = found
            return SplitRule("bytes", val_fraction, end=end, skipped=skipped, total_bytes=total)
    tolerance = min(SEARCHED, int(wanted / 20))
    return SplitRule(
        "tails",
        val_fraction,
        tolerance=tolerance,
        long_sizes=tuple(long_sizes),
        total_bytes=total,
    )


def _smallest_hashes(
    buckets: "np.ndarray[tuple[int], np.dtype[np.int64]]", wanted: float
) -> tuple[int, tuple[int, ...]] | None:
    """Return the end of the buckets that hold about ``wanted`` bytes, and those left out of them.

    Equal documents are in one bucket. If that is too large to come near ``wanted``, it is left out.

    Returns:
        None if no choice is within a tenth of ``wanted``, and leaves something for training.
    """
    large = buckets > wanted / 5
    sums = np.cumsum(np.where(large, 0, buckets))
    after = int(np.searchsorted(sums, wanted))
    before = int(np.searchsorted(sums, sums[after - 1])) if after else 0
    total = int(buckets.sum())
    near = [
        (abs(int(sums[index]) - wanted), index)
        for index in (before, after)
        if index < len(sums) and sums[index] < total
    ]
    if not near or min(near)[0] > wanted / 10:
        return None
    end = min(near)[1] + 1
    return end, tuple(np.flatnonzero(large[:end]).tolist())
