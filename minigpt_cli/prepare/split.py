"""Which documents become validation: decided from the text, so that it never changes.

Three rules, by the corpus's size, so that there is validation data whenever there can be:

- one document: cut near its end, before white space; what follows is validation (nanoGPT's way);
- at most ``FEW`` documents and ``_SURVEYED`` bytes: those with the smallest hashes, at least one;
- otherwise: every document whose hash falls below ``val_fraction``.

The hash is the sha256 of the document's UTF-8 bytes, of the first piece only (about
``LONG_DOCUMENT`` bytes) when it comes in several: a document's place must be known before its end
is read.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from minigpt_cli.core.errors import UserError
from minigpt_cli.prepare.documents import documents
from minigpt_cli.prepare.pieces import Position, cut
from minigpt_cli.prepare.sources import Source

FEW = 100
_SURVEYED = 64 << 20


@dataclass(frozen=True)
class Rule:
    """``name``: "hash", "smallest" (``digests``, hex) or "tail" (``cut_at``, bytes)."""

    name: str
    val_fraction: float
    digests: tuple[str, ...] = ()
    cut_at: int = 0


class Place(NamedTuple):
    """A position in the source, and whether the document that it is inside of is validation."""

    position: Position = Position()
    val: bool = False


class Placed(NamedTuple):
    """A piece of a document in its split.

    ``mark`` stands for the source's piece in the fingerprint of the text: its sha256 and whether
    its document ends with it. It and ``after``, where to go on, are None for the first part of a
    piece that was cut in two: positions lie between the source's pieces.
    """

    data: bytes
    val: bool
    last: bool
    mark: bytes | None
    after: Place | None


def choose_rule(source: Source, strict: bool, val_fraction: float) -> Rule:
    """Read as much of the source as it takes to choose; ``UserError`` when it has no document."""
    first_bad: list[str] = []

    def on_bad(message: str) -> None:
        first_bad[1:] = [message]

    digests: set[bytes] = set()
    count = size = 0
    begins = True
    for piece in documents(source, strict, on_bad):
        if begins:
            if val_fraction == 0 or count == FEW or (count and size > _SURVEYED):
                return Rule("hash", val_fraction)
            count += 1
            digests.add(hashlib.sha256(piece.data).digest())
        size += len(piece.data)
        begins = piece.last
    if count == 0:
        where = ", ".join(source.path) or source.kind
        because = f"; everything was skipped, for example {first_bad[-1]}" if first_bad else ""
        raise UserError(f"no text found in {where}{because}")
    if count == 1:
        return Rule("tail", val_fraction, cut_at=max(1, int(size * (1 - val_fraction))))
    # Documents with the same text go together, and one text must be left for training.
    wanted = min(max(1, round(count * val_fraction)), len(digests) - 1)
    return Rule("smallest", val_fraction, tuple(d.hex() for d in sorted(digests)[:wanted]))


def placed(
    source: Source,
    rule: Rule,
    strict: bool,
    on_bad: Callable[[str], None] | None,
    start: Place,
) -> Iterator[Placed]:
    """Yield the source's pieces from ``start`` on, each in its split."""
    held_out = {bytes.fromhex(digest) for digest in rule.digests}
    threshold = rule.val_fraction * 2.0**64
    inside, val = start.position.inside, start.val
    for data, last, after in documents(source, strict, on_bad, start.position):
        digest = hashlib.sha256(data).digest()
        mark = digest + bytes([last])
        if rule.name == "tail":
            here, end = inside, inside + len(data)
            if here < rule.cut_at < end and len(data) > 1:
                at = cut(data, rule.cut_at - here)
                head, data = data[:at], data[at:]
                yield Placed(head, False, True, None, None)
            val = here >= rule.cut_at or end > rule.cut_at
            last = last or end == rule.cut_at
        elif not inside:
            val = (
                digest in held_out
                if rule.name == "smallest"
                else int.from_bytes(digest[:8]) < threshold
            )
        yield Placed(data, val, last, mark, Place(after, val))
        inside = after.inside
