"""Decide which documents are validation, from their text alone, so that it never changes.

There are three rules. The size of the corpus decides which one applies, so that there is validation
data whenever there can be:

- tail: one document is cut near its end, before white space; the end is validation (as in nanoGPT);
- smallest: of at most ``FEW`` documents and ``_SURVEYED`` bytes, those with the smallest hashes are
  validation, at least one;
- hash: of more, every document whose hash is below ``val_fraction`` is validation.

The hash is the sha256 of the document's UTF-8 bytes. A document longer than ``LONG_DOCUMENT`` bytes
is read in pieces, and its split must be known before its end is read: the first piece is hashed.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from minigpt_cli.core.errors import UserError
from minigpt_cli.prepare.documents import documents
from minigpt_cli.prepare.pieces import OnBad, Position, find_cut
from minigpt_cli.prepare.sources import Source

FEW = 100
_SURVEYED = 64 << 20


@dataclass(frozen=True)
class SplitRule:
    """The rule that assigns the documents of a source to splits.

    Attributes:
        name: "hash", "smallest" or "tail".
        val_fraction: The share of the documents that becomes validation.
        digests: The sha256 (hex) of the validation documents; for "smallest" only.
        cut_at: The bytes of the document that are for training; for "tail" only.
    """

    name: str
    val_fraction: float
    digests: tuple[str, ...] = ()
    cut_at: int = 0


class SplitPosition(NamedTuple):
    """A position in the source, with the split of the document around it.

    Attributes:
        position: The position.
        val: Whether the document that continues there is validation.
    """

    position: Position = Position()
    val: bool = False


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


def choose_split_rule(source: Source, strict: bool, val_fraction: float) -> SplitRule:
    """Choose the rule for a source; read only as much of it as that takes.

    Args:
        source: What to read.
        strict: Refuse bad text, as in ``documents``.
        val_fraction: The share of the documents for validation, at least 0 and below 1.

    Raises:
        UserError: The source has no text, or can't be read.
    """
    last_bad: list[str] = []

    def on_bad(message: str) -> None:
        last_bad[:] = [message.removesuffix("; skipped")]

    digests: set[bytes] = set()
    count = size = 0
    begins = True
    for piece in documents(source, strict, on_bad):
        if begins:
            if val_fraction == 0 or count == FEW or (count and size > _SURVEYED):
                return SplitRule("hash", val_fraction)
            count += 1
            digests.add(hashlib.sha256(piece.data).digest())
        size += len(piece.data)
        begins = piece.last
    if count == 0:
        where = ", ".join(source.path) or source.kind
        example = f"; everything was skipped, for example {last_bad[0]}" if last_bad else ""
        raise UserError(f"no text found in {where}{example}")
    if count == 1:
        return SplitRule("tail", val_fraction, cut_at=max(1, int(size * (1 - val_fraction))))
    # Equal documents stay together, and one distinct text must be left for training.
    wanted = min(max(1, round(count * val_fraction)), len(digests) - 1)
    return SplitRule("smallest", val_fraction, tuple(d.hex() for d in sorted(digests)[:wanted]))


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
        UserError: The source can't be read.
    """
    held_out = {bytes.fromhex(digest) for digest in rule.digests}
    threshold = rule.val_fraction * 2.0**64
    inside, val = start.position.inside, start.val
    for data, last, after in documents(source, strict, on_bad, start.position):
        digest = hashlib.sha256(data).digest()
        mark = digest + bytes([last])
        if rule.name == "tail":
            here, end = inside, inside + len(data)
            if here < rule.cut_at < end and len(data) > 1:
                at = find_cut(data, rule.cut_at - here)
                head, data = data[:at], data[at:]
                yield SplitPiece(head, False, True, None, None)
            val = here >= rule.cut_at or end > rule.cut_at
            last = last or end == rule.cut_at
        elif not inside:
            val = (
                digest in held_out
                if rule.name == "smallest"
                else int.from_bytes(digest[:8]) < threshold
            )
        yield SplitPiece(data, val, last, mark, SplitPosition(after, val))
        inside = after.inside
