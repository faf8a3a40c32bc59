"""The journal: those of earlier versions are continued, damaged ones are one line."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.data.dataset import open_dataset
from minigpt_cli.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from minigpt_cli.prepare.bpe import train_bpe
from minigpt_cli.prepare.journal import read_journal
from minigpt_cli.prepare.sources import Source, listing
from minigpt_cli.prepare.tokenize import tokenize
from tests.helpers.documents import json_lines

TEXTS = [f"document {i}" * (i % 5 + 1) for i in range(300)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    file = tmp_path / "tokenizer.json"
    train_bpe(iter(TEXTS), 300).save(str(file))
    return file


def unfinished(folder: Path, texts: list[str], tokenizer: Path, rule: dict[str, Any]) -> Source:
    """Write what a version with format 1 left in ``out`` when it was killed at its start."""
    file, out = folder / "a.jsonl", folder / "out"
    file.write_text(json_lines(*({"text": text} for text in texts)))
    source = Source("jsonl", (str(file),))
    out.mkdir()
    (out / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    fingerprint = tokenizer_fingerprint(load_tokenizer(tokenizer))
    settings = {
        "source": {"kind": "jsonl", "field": "text"},
        "source_files": listing(source)[0],
        "tokenizer": fingerprint,
        "val_fraction": 0.3,
        "shard_tokens": 1000,
    }
    record = {
        "format": 1,
        "settings": settings,
        "source_modified": file.stat().st_mtime_ns,
        "tokenizer_fingerprint": fingerprint,
        "rule": {"val_fraction": 0.3, "digests": [], "cut_at": 0} | rule,
        "state": {
            "place": [[0, 0, 0, 0, 0], False],
            "chain": "",
            "documents": [0, 0],
            "bytes": [0, 0],
            "shards": [[], []],
            "pending": [0, 0],
        },
    }
    (out / "journal.json").write_text(json.dumps(record))
    return source


def finish(folder: Path, source: Source, tokenizer: Path) -> dict[str, list[str]]:
    """Tokenize; return the documents of each split."""
    tokenize(
        source,
        folder / "out",
        tokenizer_path=tokenizer,
        val_fraction=0.3,
        shard_tokens=1000,
        warn=pytest.fail,
    )
    loaded = load_tokenizer(tokenizer)
    found = {}
    for name, split in open_dataset(folder / "out", verify=True).splits.items():
        text = loaded.decode(split.slice(0, split.tokens).tolist(), skip_special_tokens=False)
        found[name] = text.split("<|endoftext|>")[:-1]
    return found


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_rules_of_earlier_versions(tmp_path: Path, tokenizer: Path) -> None:
    smallest = sorted(map(digest, TEXTS))[:90]
    for name, rule in (("hash", {}), ("smallest", {"digests": smallest})):
        folder = tmp_path / name
        folder.mkdir()
        source = unfinished(folder, TEXTS, tokenizer, {"name": name} | rule)
        found = finish(folder, source, tokenizer)
        if name == "hash":
            val = [text for text in TEXTS if int(digest(text)[:16], 16) < 0.3 * 2**64]
        else:
            val = [text for text in TEXTS if digest(text) in smallest]
        assert found["val"] == val
        assert sorted(found["train"] + val) == sorted(TEXTS)
    folder = tmp_path / "tail"
    folder.mkdir()
    text = " ".join(TEXTS)
    cut = text.rfind(" d", 0, 1235)
    source = unfinished(folder, [text], tokenizer, {"name": "tail", "cut_at": 1234})
    assert finish(folder, source, tokenizer) == {"train": [text[:cut]], "val": [text[cut:]]}


def changes() -> list[tuple[str, Any]]:
    deep: Any = []
    for _ in range(200):
        deep = [deep]
    shard = {"file": "../../x", "tokens": 1, "bytes_on_disk": 130, "sha256": "0" * 64}
    return [
        ("format", 99),
        ("format", "1"),
        ("settings", []),
        ("source_modified", "now"),
        ("tokenizer_fingerprint", 5),
        ("rule", None),
        ("rule", {"name": "other", "val_fraction": 0.1}),
        ("rule", {"name": "hash", "val_fraction": "x"}),
        ("state", 3),
        ("state.place", 3),
        ("state.place", [[0, 0, 0, 0], False]),
        ("state.place", [[0, 0, 0, 0, -1], False]),
        ("state.place", [[0, 0, 0, 0, 0], 0]),
        ("state.place", [[0, 0, 0, 0, 0], False, *range(9)]),
        ("state.place", deep),
        ("state.chain", "xyz"),
        ("state.chain", None),
        ("state.documents", [0]),
        ("state.pending", [0.5, 0]),
        ("state.pending", [10**6, 0]),
        ("state.shards", [[], [], []]),
        ("state.shards", [[{}], []]),
        ("state.shards", [[shard], []]),
        ("state.shards", [[shard | {"file": ".."}], []]),
    ]


@pytest.mark.parametrize(("name", "value"), changes())
def test_a_damaged_journal_is_one_line(
    tmp_path: Path, tokenizer: Path, name: str, value: Any
) -> None:
    source = unfinished(tmp_path, TEXTS, tokenizer, {"name": "hash"})
    file = tmp_path / "out/journal.json"
    record = json.loads(file.read_text())
    *parents, last = name.split(".")
    (record[parents[0]] if parents else record)[last] = value
    file.write_text(json.dumps(record))
    with pytest.raises(Damaged, match=r"journal\.json.*delete .*out") as caught:
        finish(tmp_path, source, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"[" * 100_000, b"\xff", b'{"format": 1}'])
def test_a_journal_of_another_form_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "journal.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"journal\.json.*delete") as caught:
        read_journal(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_pipe_is_no_journal(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "journal.json")
    with pytest.raises(UserError, match="is not a regular file"):
        read_journal(tmp_path)
