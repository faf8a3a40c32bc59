"""The journal of an unfinished tokenization, ``journal.json``: where to continue after a kill."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.core.files import write_atomically
from minigpt_cli.core.reading import build, parse_json, read_bytes
from minigpt_cli.data.dataset_manifest import JOURNAL, Shard, check_bare_name
from minigpt_cli.prepare.pieces import Position
from minigpt_cli.prepare.split import SplitPosition
from minigpt_cli.prepare.split_rule import RULES, SplitRule

_FORMAT = 2  # format 1 is that of earlier versions, with fewer fields and other rules


@dataclass(frozen=True)
class State:
    """How far the source is read and the shards are written. Plain JSON values.

    Attributes:
        place: where reading continues.
        chain: fingerprint of the text so far, hex: sha256 over the previous value, the sha256 of a
            piece and whether its document ends with it. Unlike a sha256 over all text, it can be
            saved and continued.
        documents: documents per split, in the order of ``SPLITS``.
        bytes: UTF-8 bytes of text per split.
        shards: finished shards per split.
        pending: tokens in the unfinished shard of each split.
    """

    place: SplitPosition = field(default_factory=SplitPosition)
    chain: str = ""
    documents: tuple[int, ...] = (0, 0)
    bytes: tuple[int, ...] = (0, 0)
    shards: tuple[tuple[Shard, ...], ...] = ((), ())
    pending: tuple[int, ...] = (0, 0)

    @property
    def tokens(self) -> int:
        """Tokens written to both splits."""
        return sum(shard.tokens for shards in self.shards for shard in shards) + sum(self.pending)


@dataclass(frozen=True)
class Journal:
    """The content of ``journal.json``.

    Attributes:
        settings: what a call must have in common with this one to continue the work.
        source_modified: last modification of the source (ns since the epoch), None for a Hugging
            Face dataset.
        tokenizer_fingerprint: of the tokenizer in the dataset's directory.
        rule: how documents are assigned to splits. Choosing it again might read much of the source.
        state: how far the work is.
    """

    settings: dict[str, Any]
    source_modified: int | None
    tokenizer_fingerprint: str
    rule: SplitRule
    state: State


def write_journal(out: Path, journal: Journal) -> None:
    """Write the journal. Everything that it counts as written must be on disk already."""
    write_atomically(out / JOURNAL, json.dumps({"format": _FORMAT} | asdict(journal)).encode())


def read_journal(out: Path) -> Journal | None:
    """Return the journal in ``out``, None if there is none.

    Raises:
        UserError: it can't be read.
        Damaged: it isn't as it was written.
    """
    file = out / JOURNAL
    if not file.exists():
        return None
    content = read_bytes(file)
    try:
        record = parse_json(content, str(file), Damaged)
        if "format" not in record:
            raise UserError(f"{file}: is not a journal of minigpt: choose a new directory")
        if record.pop("format") not in (1, _FORMAT):
            raise ValueError("of another version of minigpt")
        place, state = _place(record["state"].pop("place")), record.pop("state")
        rule = build(SplitRule, record["rule"], "rule")
        if rule.name not in RULES:
            raise ValueError(f"the rule {rule.name!r} is unknown")
        return Journal(
            settings=build(dict[str, Any], record["settings"], "settings"),
            source_modified=build(int | None, record["source_modified"], "source_modified"),
            tokenizer_fingerprint=build(str, record["tokenizer_fingerprint"], "tokenizer"),
            rule=rule,
            state=_state(state, place),
        )
    except Damaged as error:
        raise Damaged(f"{error}; delete {out} to start over") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{file} can't be read ({error}): delete {out} to start over") from None


def _state(record: dict[str, Any], place: SplitPosition) -> State:
    pair = tuple[int, int]
    shards = build(tuple[tuple[Shard, ...], tuple[Shard, ...]], record["shards"], "shards")
    for shard in (shard for split in shards for shard in split):
        check_bare_name(shard.file)
    counts = {name: build(pair, record[name], name) for name in ("documents", "bytes", "pending")}
    chain = build(str, record["chain"], "chain")
    bytes.fromhex(chain)
    return State(place, chain, shards=shards, **counts)


def _place(record: Any) -> SplitPosition:
    position, val, *others = record
    numbers = build(tuple[int, int, int, int, int], position, "place")
    return SplitPosition(
        Position(*numbers), build(bool, val, "place"), *build(tuple[int, ...], others, "place")
    )
