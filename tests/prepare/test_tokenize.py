"""Tokenizing: what ends up in the shards, and that nothing on the way can change it."""

import contextlib
import fcntl
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from minigpt_cli.core.errors import Damaged, Stopped, UserError
from minigpt_cli.data.dataset import open_dataset, verify_dataset
from minigpt_cli.data.dataset_manifest import DatasetManifest
from minigpt_cli.data.tokenizer import EOS, eos_id, load_tokenizer, tokenizer_fingerprint
from minigpt_cli.prepare.bpe import train_bpe
from minigpt_cli.prepare.instructions import make_instructions
from minigpt_cli.prepare.pieces import LONG_DOCUMENT
from minigpt_cli.prepare.progress import Progress
from minigpt_cli.prepare.sources import Source, source_files
from minigpt_cli.prepare.tokenize import tokenize
from tests.helpers.waiting import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
SHAKESPEARE = REPOSITORY.parent / "shared" / "data" / "tinyshakespeare.txt"
GPT2 = REPOSITORY.parent / "shared" / "data" / "gpt2"

RUN = """
import json, sys
from minigpt_cli.prepare.sources import Source
from minigpt_cli.prepare.tokenize import tokenize
kind, path, out, options = sys.argv[1:]
try:
    tokenize(Source(kind, (path,)), out, **json.loads(options))
except KeyboardInterrupt:
    sys.exit("stopped")
"""


def start(source: Source, out: Path, **options: Any) -> "subprocess.Popen[str]":
    """A tokenization in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", RUN, source.kind, *source.path, str(out), json.dumps(options)],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def workers_of(out: Path) -> list[int]:
    """The worker processes of any tokenization into ``out``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_bytes().split(b"\0")
            if (
                b"minigpt_cli.prepare.encode" in command
                and str(out / "tokenizer.json").encode() in command
            ):
                found.append(int(process.name))
    return found


def more_shards_than(out: Path, count: int, run: "subprocess.Popen[str]") -> Callable[[], object]:
    return lambda: run.poll() is not None or len(list(out.glob("*.npy"))) > count


def content(out: Path) -> dict[str, str]:
    """The sha256 of every file of a dataset."""
    files = sorted(file for file in out.iterdir() if file.name != ".lock")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def tokens_of(out: Path, split: str) -> list[int]:
    data = open_dataset(out, verify=True).splits[split]
    return data.slice(0, data.tokens).tolist()


def stdlib_text() -> list[str]:
    files = source_files(Source("python-stdlib"))[:150]
    return [text for file in files if (text := file.read_text(errors="replace"))]


def write_jsonl(file: Path, texts: list[str]) -> Source:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source("jsonl", (str(file),))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """What one document must become."""
    return [*tokenizer.encode(text, add_special_tokens=False).ids, eos_id(tokenizer)]


def held_out(texts: list[str], fraction: float) -> set[str]:
    """The texts with the smallest hashes, up to about this share of the bytes."""
    ranked = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    sizes = [sum(len(text.encode()) for text in ranked[:end]) for end in range(len(ranked))]
    wanted = fraction * sum(len(text.encode()) for text in texts)
    return set(ranked[: min(range(len(ranked)), key=lambda end: abs(sizes[end] - wanted))])


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(iter(stdlib_text()[:40]), 1000).save(str(file))
    return str(file)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_file: str) -> Tokenizer:
    return load_tokenizer(tokenizer_file)


@pytest.fixture
def corpus(quick: Path) -> Source:
    """About 2 MB of JSON lines: many short documents, a long one, and bad lines among them."""
    source = write_jsonl(quick / "corpus.jsonl", many_texts())
    with (quick / "corpus.jsonl").open("a") as stream:
        stream.write("bad\n" + json.dumps({"text": "long words " * 130_000}) + "\nbad\n")
    return source


def many_texts() -> list[str]:
    texts = stdlib_text()
    parts = [text[i : i + 3000] for text in texts for i in range(0, len(text), 3000)]
    return [*parts[:600], f"not the end: {EOS} of it", "żółw 👍 語", ""]


# What is in the shards


def test_documents_by_hash_and_eos(quick: Path, tokenizer_file: str, tokenizer: Tokenizer) -> None:
    texts = many_texts()
    source = write_jsonl(quick / "x.jsonl", texts)
    manifest = tokenize(
        source, quick / "out", tokenizer_path=tokenizer_file, val_fraction=0.2, shard_tokens=100_000
    )
    val = held_out(texts, 0.2)
    for split in ("train", "val"):
        mine = [text for text in texts if text and (text in val) == (split == "val")]
        expected = []
        for text in mine:
            expected += ids_of(tokenizer, text)
        assert tokens_of(quick / "out", split) == expected
        found = manifest.splits[split]
        assert found.documents == len(mine) == expected.count(eos_id(tokenizer))
        assert found.bytes == sum(len(text.encode()) for text in mine)
        assert found.tokens == len(expected)
        assert all(shard.tokens == 100_000 for shard in found.shards[:-1])
        assert len(found.shards) == -(-len(expected) // 100_000)
    assert manifest.splits["val"].bytes / sum(map(len, texts)) == pytest.approx(0.2, rel=0.02)
    assert manifest.dtype == "uint16"
    assert manifest.vocab_size == 1000
    assert manifest.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert not (quick / "out" / "journal.json").exists()


def test_tokenizer_sees_training_split_only(quick: Path) -> None:
    texts = many_texts()[:300]
    source = write_jsonl(quick / "x.jsonl", texts)
    manifest = tokenize(source, quick / "out", train_vocab=500, val_fraction=0.5)
    val = held_out(texts, 0.5)
    mine = train_bpe((text for text in texts if text not in val), 500)
    assert manifest.tokenizer_fingerprint == tokenizer_fingerprint(mine)
    assert tokenizer_fingerprint(load_tokenizer(quick / "out")) == tokenizer_fingerprint(mine)
    assert tokenizer_fingerprint(train_bpe(iter(texts), 500)) != tokenizer_fingerprint(mine)


def test_a_single_document_is_cut_near_its_end(
    quick: Path, tokenizer_file: str, tokenizer: Tokenizer
) -> None:
    text = "".join(stdlib_text()[:9]) + "żółw 👍"
    (quick / "x.txt").write_text(text)
    manifest = tokenize(
        Source("files", (str(quick / "x.txt"),)),
        quick / "out",
        tokenizer_path=tokenizer_file,
        val_fraction=0.1,
    )
    ids = {split: tokens_of(quick / "out", split) for split in ("train", "val")}
    ends = eos_id(tokenizer)
    assert all(split.index(ends) == len(split) - 1 for split in ids.values())
    head, tail = (tokenizer.decode(split[:-1]) for split in ids.values())
    assert head + tail == text
    assert tail[0] == " "
    assert head[-1] not in " \n"
    assert len(tail.encode()) / len(text.encode()) == pytest.approx(0.1, abs=0.001)
    assert ids["train"][:-1] == tokenizer.encode(head, add_special_tokens=False).ids
    assert [manifest.splits[split].documents for split in ("train", "val")] == [1, 1]


@pytest.mark.skipif(not (SHAKESPEARE.exists() and GPT2.exists()), reason="needs ../shared/data")
def test_tiny_shakespeare(quick: Path) -> None:
    tokenize(Source("files", (str(SHAKESPEARE),)), quick / "out", tokenizer_path=GPT2)
    splits = open_dataset(quick / "out").splits
    # 301,966 + 36,059 in nanoGPT's readme; ours end each part with EOS
    assert splits["train"].tokens + splits["val"].tokens == 338_025 + 2


@pytest.mark.parametrize("kind", ["jsonl", "files"])
def test_a_tail_beyond_the_first_piece(quick: Path, tokenizer_file: str, kind: str) -> None:
    text = "".join(f"word {i}\n" for i in range(250_000))
    assert len(text) > 2.5 * LONG_DOCUMENT
    if kind == "jsonl":
        source = write_jsonl(quick / "x.jsonl", [text])
    else:
        (quick / "x.txt").write_text(text)
        source = Source("files", (str(quick / "x.txt"),))
    manifest = tokenize(source, quick / "out", tokenizer_path=tokenizer_file, val_fraction=0.5)
    found = {split: manifest.splits[split] for split in ("train", "val")}
    assert found["val"].bytes == pytest.approx(len(text) / 2, abs=100)
    assert found["train"].bytes + found["val"].bytes == len(text)
    assert found["train"].documents == found["val"].documents == 1


def test_no_validation_when_none_is_asked_for(quick: Path, tokenizer_file: str) -> None:
    (quick / "x.txt").write_text("one document")
    source = Source("files", (str(quick / "x.txt"),))
    manifest = tokenize(source, quick / "out", tokenizer_path=tokenizer_file, val_fraction=0)
    assert manifest.splits["val"].tokens == 0
    assert open_dataset(quick / "out").splits["val"].num_sequences(8) == 0
    assert manifest.splits["train"].documents == 1


def test_a_long_document_gives_the_ids_of_the_whole(
    quick: Path, tokenizer_file: str, tokenizer: Tokenizer
) -> None:
    long = "".join(stdlib_text())[: 5 * LONG_DOCUMENT // 2]
    source = write_jsonl(quick / "x.jsonl", ["short", long, "short too"])
    tokenize(source, quick / "out", tokenizer_path=tokenizer_file, val_fraction=0)
    expected = []
    for text in ("short", long, "short too"):
        expected += ids_of(tokenizer, text)
    assert tokens_of(quick / "out", "train") == expected


def test_the_source_fingerprint_covers_the_text_alone(quick: Path, tokenizer_file: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = ["one", "two " * (LONG_DOCUMENT // 3), "three"]
    pq.write_table(pa.table({"text": texts}), quick / "x.parquet")
    sources = {
        "jsonl": write_jsonl(quick / "x.jsonl", texts),
        "parquet": Source("parquet", (str(quick / "x.parquet"),)),
        "order": write_jsonl(quick / "y.jsonl", texts[::-1]),
        "joined": write_jsonl(quick / "z.jsonl", [texts[0], texts[1] + texts[2]]),
        "single": write_jsonl(quick / "s.jsonl", texts[1:2]),
    }
    found = {
        (name, fraction): tokenize(
            source,
            quick / f"{name}-{fraction}",
            tokenizer_path=tokenizer_file,
            val_fraction=fraction,
        ).source_fingerprint
        for name, source in sources.items()
        for fraction in ((0.3, 0) if name in ("jsonl", "single") else (0,))
    }
    assert found["jsonl", 0] == found["parquet", 0] == found["jsonl", 0.3]
    assert found["single", 0] == found["single", 0.3]
    assert len(set(found.values())) == 4


def test_a_large_vocabulary_is_stored_in_32_bits(quick: Path, tokenizer: Tokenizer) -> None:
    record = json.loads(tokenizer.to_str())
    vocab = record["model"]["vocab"]
    vocab |= {f"never{i}": i for i in range(len(vocab), 65_536)}
    for size, dtype in ((65_536, "uint16"), (65_537, "uint32")):
        if size > 65_536:  # its first merge, and so any text with it, gets an id beyond 16 bits
            record["model"]["vocab"] = vocab | {"".join(record["model"]["merges"][0]): 65_536}
        (quick / "tokenizer.json").write_text(json.dumps(record))
        out = quick / f"out{size}"
        source = write_jsonl(quick / "x.jsonl", stdlib_text()[:3])
        manifest = tokenize(source, out, tokenizer_path=quick / "tokenizer.json")
        assert (manifest.vocab_size, manifest.dtype) == (size, dtype)
        assert np.load(out / "train-00000.npy").dtype == dtype
        assert (max(tokens_of(out, "train")) == 65_536) == (size == 65_537)


def test_line_without_white_space(quick: Path, tokenizer_file: str) -> None:
    (quick / "x.txt").write_bytes(b"a" * 8_000_000)
    code = RUN + (
        "import resource\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    options = json.dumps({"tokenizer_path": tokenizer_file, "workers": 2})
    done = subprocess.run(
        [sys.executable, "-c", code, "files", str(quick / "x.txt"), str(quick / "out"), options],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=40,
        check=True,
    )
    main, worker = (int(line) / 1024 for line in done.stdout.split())
    print(main, worker)
    assert main < 120, main
    assert worker < 350, worker
    split = open_dataset(quick / "out").manifest.splits
    assert split["train"].bytes + split["val"].bytes == 8_000_000


def test_bad_lines_are_reported_and_counted(quick: Path, tokenizer_file: str) -> None:
    source = write_jsonl(quick / "x.jsonl", [f"text {i}" for i in range(200)])
    with (quick / "x.jsonl").open("a") as stream:
        stream.write("bad\n" * 50)
    told: list[str] = []
    manifest = tokenize(source, quick / "out", tokenizer_path=tokenizer_file, warn=told.append)
    assert manifest.bad_lines == 50
    assert told[0].startswith(f"{quick}/x.jsonl:201: not valid JSON")
    assert len(told) == 21
    assert "further bad lines" in told[-1]
    with pytest.raises(UserError, match=r"x\.jsonl:201: .*strict"):
        tokenize(source, quick / "strict", tokenizer_path=tokenizer_file, strict=True)


def test_progress_ends_at_what_the_manifest_says(
    corpus: Source, quick: Path, tokenizer_file: str
) -> None:
    seen: list[Progress] = []
    manifest = tokenize(
        corpus,
        quick / "out",
        tokenizer_path=tokenizer_file,
        progress=seen.append,
        warn=lambda _: None,
    )
    assert [p.bytes for p in seen] == sorted(p.bytes for p in seen)
    assert len(seen) > 3
    splits = manifest.splits.values()
    assert seen[-1].bytes == sum(split.bytes for split in splits)
    assert seen[-1].documents == sum(split.documents for split in splits)
    assert seen[-1].tokens == sum(split.tokens for split in splits)
    assert seen[-1].total_bytes == seen[-1].bytes


# Nothing on the way changes it


SHARDS = {"val_fraction": 0.1, "shard_tokens": 40_000}


@pytest.fixture
def straight(corpus: Source, quick: Path, tokenizer_file: str) -> dict[str, str]:
    """The files of a run that nothing disturbed."""
    out = quick / "straight"
    tokenize(corpus, out, tokenizer_path=tokenizer_file, workers=2, warn=lambda _: None, **SHARDS)
    found = content(out)
    assert len(found) > 10
    return found


def test_workers_make_no_difference(
    corpus: Source, straight: dict[str, str], quick: Path, tokenizer_file: str
) -> None:
    for workers in (1, 5):
        out = quick / f"with{workers}"
        tokenize(
            corpus,
            out,
            tokenizer_path=tokenizer_file,
            workers=workers,
            warn=lambda _: None,
            **SHARDS,
        )
        assert content(out) == straight


def test_killed_at_random_moments_it_goes_on(
    corpus: Source, straight: dict[str, str], quick: Path, tokenizer_file: str
) -> None:
    out = quick / "killed"
    draw = random.Random(1)
    notices = []
    for attempt in range(6):
        run = start(corpus, out, tokenizer_path=tokenizer_file, workers=2, **SHARDS)
        begun = len(list(out.glob("*.npy"))) if out.exists() else 0
        if attempt == 0 or draw.random() < 0.7:  # mostly not while it is still starting
            wait_until(more_shards_than(out, begun, run))
        time.sleep(draw.random() * 0.3)
        run.send_signal(signal.SIGKILL)
        notices.append(run.communicate()[1])
        wait_until(lambda: not workers_of(out))
        if (out / "dataset.json").exists():
            break
    run = start(corpus, out, tokenizer_path=tokenizer_file, workers=2, **SHARDS)
    notices.append(run.communicate()[1])
    assert run.returncode == 0, notices
    assert content(out) == straight
    assert any("continuing after" in notice for notice in notices), notices


def test_interrupted_after_each_shard_it_goes_on(
    corpus: Source, straight: dict[str, str], quick: Path, tokenizer_file: str
) -> None:
    out = quick / "stopped"
    steps: list[int] = []

    def stop_at_next_shard(progress: Progress) -> None:
        steps.append(progress.bytes)
        if len(list(out.glob("*.npy"))) > begun:
            raise Stopped("asked to", signal.SIGTERM)

    for _ in range(30):
        begun = len(list(out.glob("*.npy"))) if out.exists() else 0
        try:
            tokenize(
                corpus,
                out,
                tokenizer_path=tokenizer_file,
                workers=1,
                progress=stop_at_next_shard,
                warn=lambda _: None,
                **SHARDS,
            )
            break
        except Stopped:
            assert not workers_of(out)
            assert not (out / "dataset.json").exists()
            with pytest.raises(UserError, match="unfinished"):
                open_dataset(out)
    assert len(steps) > 3
    assert content(out) == straight


def test_killed_before_the_manifest(
    corpus: Source, straight: dict[str, str], quick: Path, tokenizer_file: str
) -> None:
    out = quick / "late"

    def run(progress: Callable[[Progress], None] | None) -> None:
        tokenize(
            corpus,
            out,
            tokenizer_path=tokenizer_file,
            progress=progress,
            warn=lambda _: None,
            **SHARDS,
        )

    def stop(_: Progress) -> None:
        if (out / "train-00002.npy").exists():
            raise Stopped("asked to", signal.SIGTERM)

    with pytest.raises(Stopped):
        run(stop)
    journal = (out / "journal.json").read_bytes()
    run(None)
    (out / "dataset.json").unlink()
    (out / "journal.json").write_bytes(journal)
    (out / "train-00099.npy.partial").write_bytes(b"left over")
    run(None)
    assert content(out) == straight


def test_ctrl_c_prints_one_line_and_leaves_nobody(
    corpus: Source, straight: dict[str, str], quick: Path, tokenizer_file: str
) -> None:
    out = quick / "interrupted"
    run = start(corpus, out, tokenizer_path=tokenizer_file, workers=2, **SHARDS)
    wait_until(lambda: list(out.glob("*.npy")))
    os.killpg(run.pid, signal.SIGINT)
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == 1
    assert [line for line in errors.splitlines() if "bad" not in line and "JSON" not in line] == [
        "stopped"
    ]
    assert not workers_of(out)
    tokenize(corpus, out, tokenizer_path=tokenizer_file, warn=lambda _: None, **SHARDS)
    assert content(out) == straight


def test_a_worker_that_dies_is_one_clear_error(
    corpus: Source, straight: dict[str, str], quick: Path, tokenizer_file: str
) -> None:
    out = quick / "died"

    def kill_one(_: Progress) -> None:
        for worker in workers_of(out)[:1]:
            os.kill(worker, signal.SIGKILL)

    with pytest.raises(UserError, match=r"tokenizer process died \(SIGKILL\).*fewer --workers"):
        tokenize(
            corpus,
            out,
            tokenizer_path=tokenizer_file,
            progress=kill_one,
            workers=2,
            warn=lambda _: None,
            **SHARDS,
        )
    tokenize(corpus, out, tokenizer_path=tokenizer_file, warn=lambda _: None, **SHARDS)
    assert content(out) == straight


def test_two_processes_never_share_a_directory(
    corpus: Source, quick: Path, tokenizer_file: str
) -> None:
    out = quick / "shared"
    out.mkdir()
    with (out / ".lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        run = start(corpus, out, tokenizer_path=tokenizer_file)
        assert "another process is tokenizing into" in run.communicate()[1]
        with pytest.raises(UserError, match="another process is tokenizing"):
            tokenize(corpus, out, tokenizer_path=tokenizer_file)
    run = start(corpus, out, tokenizer_path=tokenizer_file, **SHARDS)
    wait_until(lambda: list(out.glob("*.npy")))
    run.send_signal(signal.SIGSTOP)  # else it may end before the other process looks
    with pytest.raises(UserError, match="another process is tokenizing"):
        tokenize(corpus, out, tokenizer_path=tokenizer_file, **SHARDS)
    run.send_signal(signal.SIGCONT)
    run.communicate()
    assert run.returncode == 0
    assert list(verify_dataset(out)) == []


# Running it again


def test_a_complete_dataset_is_returned_as_it_is(
    quick: Path, tokenizer_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(quick / "x.jsonl", many_texts()[:200])
    out = quick / "out"
    manifest = tokenize(source, out, train_vocab=300)
    before = {file.name: file.stat().st_mtime_ns for file in out.iterdir()}
    assert tokenize(source, out, train_vocab=300) == manifest
    assert tokenize(source, out, tokenizer_path=out) == manifest  # the one that was trained
    os.utime(quick / "x.jsonl")
    assert tokenize(source, out, train_vocab=300) == manifest
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    for change, message in (
        ({"train_vocab": 301}, "tokenizer: bpe-300 -> bpe-301"),
        ({"tokenizer_path": tokenizer_file}, "tokenizer: "),
        ({"train_vocab": 300, "val_fraction": 0.1}, r"val_fraction: 0.05 -> 0.1"),
    ):
        with pytest.raises(UserError, match=f"other settings.*{message}.*choose another directory"):
            tokenize(source, out, **change)
    write_jsonl(quick / "x.jsonl", many_texts()[:201])
    with pytest.raises(UserError, match="the source's files have other names or sizes"):
        tokenize(source, out, train_vocab=300)
    assert {file.name: file.stat().st_mtime_ns for file in out.iterdir()} == before
    monkeypatch.chdir(quick)
    (out / "train-00000.npy").unlink()
    write_jsonl(quick / "x.jsonl", many_texts()[:200])
    with pytest.raises(Damaged, match="is missing"):
        tokenize(Source("jsonl", ("x.jsonl",)), out, train_vocab=300)


@pytest.fixture
def unfinished(corpus: Source, quick: Path, tokenizer_file: str) -> Path:
    out = quick / "unfinished"

    def stop(_: Progress) -> None:
        if len(list(out.glob("*.npy"))) > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(
            corpus, out, tokenizer_path=tokenizer_file, progress=stop, warn=lambda _: None, **SHARDS
        )
    return out


def test_settings_never_mix(
    corpus: Source, unfinished: Path, tokenizer_file: str, quick: Path
) -> None:
    before = content(unfinished)
    for change, message in (
        ({"val_fraction": 0.2}, "val_fraction: 0.1 -> 0.2"),
        ({"shard_tokens": 999}, "shard_tokens: 40000 -> 999"),
    ):
        with pytest.raises(UserError, match=f"unfinished dataset with other settings.*{message}"):
            tokenize(corpus, unfinished, tokenizer_path=tokenizer_file, **SHARDS | change)
    with pytest.raises(UserError, match="tokenizer: "):
        tokenize(corpus, unfinished, train_vocab=300, **SHARDS)
    file = Path(corpus.path[0])
    times = file.stat()
    os.utime(file)
    with pytest.raises(UserError, match="written since"):
        tokenize(corpus, unfinished, tokenizer_path=tokenizer_file, **SHARDS)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert content(unfinished) == before
    shard = unfinished / "train-00000.npy"
    os.truncate(shard, 5000)
    with pytest.raises(Damaged, match=r"train-00000\.npy.*delete"):
        tokenize(corpus, unfinished, tokenizer_path=tokenizer_file, **SHARDS)


def test_other_settings_start_over(corpus: Source, quick: Path, tokenizer_file: str) -> None:
    out = quick / "out"

    def stop(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize(corpus, out, tokenizer_path=tokenizer_file, progress=stop, warn=lambda _: None)
    assert (out / "journal.json").exists()
    told: list[str] = []
    manifest = tokenize(corpus, out, train_vocab=300, warn=told.append)
    assert any("starting over" in message for message in told)
    assert manifest.vocab_size == 300
    assert list(verify_dataset(out)) == []


def test_what_others_left_is_not_written_over(quick: Path, tokenizer_file: str) -> None:
    """A model's tokenizer, whose ids would mean other tokens, and a dataset of instructions."""
    source = write_jsonl(quick / "x.jsonl", many_texts()[:200])
    model = quick / "model"
    model.mkdir()
    shutil.copy(tokenizer_file, model / "tokenizer.json")
    before = (model / "tokenizer.json").read_bytes()
    with pytest.raises(
        UserError, match=r"model/tokenizer\.json is another tokenizer: choose another"
    ):
        tokenize(source, model, train_vocab=300)
    (quick / "y.jsonl").write_text(json.dumps({"prompt": "one", "completion": "two"}) + "\n")
    chats = quick / "chats"
    make_instructions(
        Source("jsonl", (str(quick / "y.jsonl"),)),
        chats,
        tokenizer_path=tokenizer_file,
        chat_template=None,
        variables={},
        val_fraction=0.0,
        warn=pytest.fail,
    )
    made = content(chats)
    with pytest.raises(UserError, match="chats holds a dataset of instructions: choose another"):
        tokenize(source, chats, train_vocab=300)
    assert sorted(os.listdir(model)) == ["tokenizer.json"]
    tokenize(source, model, tokenizer_path=tokenizer_file)  # its own one may lie there
    assert (model / "tokenizer.json").read_bytes() == before
    assert content(chats) == made


def test_shards_of_unknown_origin_are_left_alone(
    corpus: Source, quick: Path, tokenizer_file: str
) -> None:
    out = quick / "out"
    out.mkdir()
    (out / "train-00000.npy").write_bytes(b"precious")
    with pytest.raises(UserError, match=r"holds train-00000\.npy but neither"):
        tokenize(corpus, out, tokenizer_path=tokenizer_file)
    assert (out / "train-00000.npy").read_bytes() == b"precious"


# What can't work is one clear line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either --tokenizer PATH, or --vocab-size N"),
        ({"tokenizer_path": "x", "train_vocab": 300}, "either --tokenizer PATH, or --vocab-size N"),
        ({"train_vocab": 256}, "at least 257"),
        ({"train_vocab": 300, "val_fraction": 1.0}, "val_fraction"),
        ({"train_vocab": 300, "val_fraction": -0.1}, "val_fraction"),
        ({"train_vocab": 300, "shard_tokens": 0}, "shard_tokens"),
        ({"train_vocab": 300, "workers": 0}, "workers"),
        ({"tokenizer_path": "/nonexistent"}, "no tokenizer at /nonexistent"),
    ],
)
def test_settings_are_checked_first(quick: Path, options: dict[str, Any], message: str) -> None:
    (quick / "x.txt").write_text("text")
    with pytest.raises(UserError, match=message) as caught:
        tokenize(Source("files", (str(quick / "x.txt"),)), quick / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (quick / "out").exists()


def test_a_corpus_without_text(quick: Path, tokenizer_file: str) -> None:
    (quick / "a.txt").write_text("")
    (quick / "b.jsonl").write_text('{"text": ""}\n{"body": "x"}\n')
    for kind, name, message in (
        ("files", "a.txt", "no text found"),
        ("jsonl", "b.jsonl", r"no text found.*b\.jsonl:2: no field 'text' \(fields: 'body'\)"),
        ("files", "missing.txt", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            tokenize(
                Source(kind, (str(quick / name),)), quick / kind, tokenizer_path=tokenizer_file
            )


def test_out_below_a_file(corpus: Source, quick: Path, tokenizer_file: str) -> None:
    (quick / "file").write_text("")
    for out in (quick / "file", quick / "file" / "out"):
        with pytest.raises(UserError, match=f"can't write to {out}"):
            tokenize(corpus, out, tokenizer_path=tokenizer_file)


@pytest.fixture
def small_disk(quick: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    disk = quick / "disk"
    disk.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("may not mount")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_and_a_read_only_one(
    corpus: Source, straight: dict[str, str], quick: Path, tokenizer_file: str, small_disk: Path
) -> None:
    def run() -> DatasetManifest:
        return tokenize(
            corpus, small_disk / "out", tokenizer_path=tokenizer_file, warn=lambda _: None, **SHARDS
        )

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(small_disk)], check=True)

    for _ in range(2):
        with pytest.raises(UserError, match=r"disk of .* is full: free some space"):
            run()
    kept = content(small_disk / "out")
    assert "train-00001.npy" in kept
    remount("ro")
    with pytest.raises(UserError, match=r"can't write to .*Read-only file system"):
        run()
    remount("rw,size=20m")
    manifest = run()
    assert content(small_disk / "out") == straight
    remount("ro")
    assert run() == manifest


def test_the_data_layer_is_light(quick: Path) -> None:
    code = (
        "import sys\n"
        "import minigpt_cli.prepare.tokenize, minigpt_cli.prepare.encode, minigpt_cli.data.order\n"
        "heavy = {'torch', 'datasets', 'pyarrow', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(REPOSITORY)}, check=True, timeout=30
    )
