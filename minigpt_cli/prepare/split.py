"""Assign the pieces of a source's documents to splits; ``split_rule.py`` chooses the rule.

The result depends on the text and the rule alone, and reading can continue at any position.
"""

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

from minigpt_cli.core.errors import UserError
from minigpt_cli.prepare.documents import documents
from minigpt_cli.prepare.pieces import OnBad, Position, find_cut
from minigpt_cli.prepare.sources import Source
from minigpt_cli.prepare.split_rule import SplitRule, hash_bucket

_SHORTEST_HEAD = 32  # bytes; less than that would be cut in the middle of a word


class SplitPosition(NamedTuple):
    """A position in the source, with what the splits are so far.

    Attributes:
        position: The position.
        val: Whether the document that continues there is validation.
        cut_at: The bytes of that document that are for training. This and the rest: for the rule
            "tails" only.
        measured: The bytes of the documents that were begun.
        held_out: Those of them that are validation.
        num_long: The documents among them that are read in several pieces.
    """

    position: Position = Position()
    val: bool = False
    cut_at: int = 0
    measured: int = 0
    held_out: int = 0
    num_long: int = 0


class SplitPiece(NamedTuple):
    """A piece of a document, assigned to a split.

    Attributes:
        data: UTF-8 text, not empty.
        val: Whether it is validation.
        last: Whether the document ends here.
        mark: What stands for the source's piece in the fingerprint of the text: its sha256, and
            one byte that says whether its document ends with it. None for the first half of a
            piece that was cut in two.
        after: Where to continue. None for such a first half: positions lie between the source's
            pieces.
    """

    data: bytes
    val: bool
    last: bool
    mark: bytes | None
    after: SplitPosition | None


def assign_splits(
    source: Source, rule: SplitRule, strict: bool, on_bad: OnBad | None, start: SplitPosition
) -> Iterator[SplitPiece]:
    """Read the pieces of a source's documents and assign each to a split.

    Args:
        source: What to read.
        rule: The rule that was chosen for this source.
        strict: Refuse bad text, as in ``documents``.
        on_bad: Called with one line for each bad text.
        start: Where to continue: the ``after`` of an earlier piece.

    Raises:
        UserError: The source can't be read, or has changed.
    """
    assign = _cut_tails if rule.name in ("tails", "tail") else _by_hash
    yield from assign(source, rule, strict, on_bad, start)


def _by_hash(
    source: Source, rule: SplitRule, strict: bool, on_bad: OnBad | None, start: SplitPosition
) -> Iterator[SplitPiece]:
    """Assign each document as a whole."""
    held_out = {bytes.fromhex(digest) for digest in rule.digests}
    skipped = frozenset(rule.skipped)
    threshold = rule.val_fraction * 2.0**64
    inside, val = start.position.inside, start.val
    for data, last, after in documents(source, strict, on_bad, start.position):
        digest = hashlib.sha256(data).digest()
        if not inside:
            if rule.name == "bytes":
                bucket = hash_bucket(digest)
                val = bucket < rule.end and bucket not in skipped
            elif rule.name == "smallest":
                val = digest in held_out
            else:
                val = int.from_bytes(digest[:8]) < threshold
        yield SplitPiece(data, val, last, digest + bytes([last]), SplitPosition(after, val))
        inside = after.inside


def _cut_tails(
    source: Source, rule: SplitRule, strict: bool, on_bad: OnBad | None, start: SplitPosition
) -> Iterator[SplitPiece]:
    """Cut documents in two."""
    position, val, cut_at, measured, held_out, num_long = start
    inside = position.inside
    for data, last, after in documents(source, strict, on_bad, position):
        mark = hashlib.sha256(data).digest() + bytes([last])
        here, end = inside, inside + len(data)
        if rule.name == "tail":  # of an earlier version: one document, and the rule has its cut
            cut_at = rule.cut_at
        elif not inside:
            size = len(data)
            if not last:
                if num_long == len(rule.long_sizes):
                    raise UserError("the source's files were written while they were read")
                size = rule.long_sizes[num_long]
                num_long += 1
            has_training = measured > held_out
            measured += size
            wanted = measured - int(measured * (1 - rule.val_fraction))
            tail = _tail(rule, size, wanted - held_out, has_training)
            held_out += tail
            cut_at = size - tail
        if here < cut_at < end:
            at = _whole_character(data, find_cut(data, cut_at - here, rule.tolerance))
            held_out += cut_at - (here + at)
            cut_at = here + at
            if here < cut_at < end:
                head, data = data[:at], data[at:]
                yield SplitPiece(head, False, True, None, None)
        val = here >= cut_at or end > cut_at
        last = last or end == cut_at
        place = SplitPosition(after, val, cut_at, measured, held_out, num_long)
        yield SplitPiece(data, val, last, mark, place)
        inside = after.inside


def _tail(rule: SplitRule, size: int, owed: int, has_training: bool) -> int:
    """Return how many bytes to cut off a document of ``size`` bytes.

    What is too little for a tail is owed to the next document. So the sum is right, for any sizes.
    """
    if owed < min(rule.shortest_tail, size):
        return 0
    if not has_training:
        return min(owed, size - 1)
    shortest_head = min(rule.tolerance, _SHORTEST_HEAD)
    return size if owed >= size - shortest_head else owed


def _whole_character(data: bytes, at: int) -> int:
    """Return where to cut; the end if there is no place between two characters."""
    return len(data) if data[at] & 0xC0 == 0x80 else at
