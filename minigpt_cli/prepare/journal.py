"""``journal.json``: how far an unfinished tokenization is, so that it can go on after a kill."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import Damaged
from minigpt_cli.core.files import write_atomically
from minigpt_cli.data.dataset_manifest import FORMAT, JOURNAL, Shard
from minigpt_cli.prepare.pieces import Position
from minigpt_cli.prepare.split import SplitPosition, SplitRule


@dataclass(frozen=True)
class State:
    """How far the shards go: what the journal holds, apart from the settings. Plain JSON values.

    ``chain`` is the running fingerprint of the text, hex: sha256 over the previous value, the
    sha256 of a piece and whether its document ends with it. Unlike a hash that is still being fed,
    it can be written down and taken up again.
    """

    place: SplitPosition = field(default_factory=SplitPosition)
    chain: str = ""
    documents: tuple[int, ...] = (0, 0)  # in the order of SPLITS, as the others
    bytes: tuple[int, ...] = (0, 0)
    shards: tuple[tuple[Shard, ...], ...] = ((), ())
    pending: tuple[int, ...] = (0, 0)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shards in self.shards for shard in shards) + sum(self.pending)


@dataclass(frozen=True)
class Journal:
    """``settings`` and ``source_modified`` (ns since the epoch, None for the Hub) tell whether a
    call means the same work; ``rule`` is kept since choosing it may read much of the source."""

    settings: dict[str, Any]
    source_modified: int | None
    tokenizer_fingerprint: str
    rule: SplitRule
    state: State


def write_journal(out: Path, journal: Journal) -> None:
    """Record the journal. What it says is written must be on disk already."""
    write_atomically(out / JOURNAL, json.dumps({"format": FORMAT} | asdict(journal)).encode())


def read_journal(out: Path) -> Journal | None:
    """Return the journal in ``out``, None when there is none; ``Damaged`` when it can't be read."""
    file = out / JOURNAL
    try:
        record = json.loads(file.read_bytes())
        if record.pop("format") != FORMAT:
            raise ValueError("of another version of minigpt")
        rule = SplitRule(**record["rule"] | {"digests": tuple(record["rule"]["digests"])})
        return Journal(**record | {"rule": rule, "state": _state(record["state"])})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{file} can't be read ({error}): delete {out} to begin anew") from None


def _state(record: dict[str, Any]) -> State:
    position, val = record["place"]
    shards = tuple(tuple(Shard(**shard) for shard in split) for split in record["shards"])
    numbers = {name: tuple(record[name]) for name in ("documents", "bytes", "pending")}
    place = SplitPosition(Position(*position), val)
    return State(place, record["chain"], shards=shards, **numbers)
