"""Datasets of instructions: tokens and loss masks, what is refused, what damage is found."""

import fcntl
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.data.chat import CHATML
from minigpt_cli.data.dataset import open_dataset, verify_dataset
from minigpt_cli.data.dataset_manifest import DatasetManifest, is_dataset
from minigpt_cli.prepare.bpe import train_bpe
from minigpt_cli.prepare.instructions import make_instructions
from minigpt_cli.prepare.sources import Source
from tests.helpers.processes import ROOT

ARRAYS = ("00000", "loss-mask", "offsets")
FILES = [f"{split}-{array}.npy" for split in ("train", "val") for array in ARRAYS]

PAIRS = [
    {"prompt": f"What is {i} and {i}?", "completion": f" It is {2 * i}. <|im_end|>"}
    for i in range(40)
]
TALKS = [
    {
        "messages": [
            {"role": "system", "content": "You count."},
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": f"{i + 1}!"},
            {"role": "user", "content": "and then?"},
            {"role": "assistant", "content": f"Then {i + 2}."},
        ]
    }
    for i in range(10)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trained = train_bpe(iter(["What is this and that? It is some text. Then you count. " * 9]), 300)
    trained.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    trained.save(str(file))
    return file


def jsonl(path: Path, *records: Any) -> Source:
    lines = [each if isinstance(each, str) else json.dumps(each) for each in records]
    path.write_text("".join(line + "\n" for line in lines))
    return Source("jsonl", (str(path),))


def make(
    source: Source,
    out: Path,
    tokenizer: Path,
    template: str | None = CHATML,
    val_fraction: float = 0.0,
    warnings: list[str] | None = None,
) -> DatasetManifest:
    return make_instructions(
        source,
        out,
        tokenizer_path=tokenizer,
        chat_template=template,
        variables={"eos_token": "<|im_end|>"},
        val_fraction=val_fraction,
        warn=(lambda line: pytest.fail(line)) if warnings is None else warnings.append,
    )


def texts(path: Path, tokenizer: Path, split: str = "train") -> list[tuple[str, str]]:
    """(whole text, text that the loss counts) of every example, decoded by a plain tokenizer."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(tokenizer))
    dataset = open_dataset(path, verify=True)
    examples = dataset.splits[split]
    found = []
    for index in range(dataset.manifest.splits[split].documents):
        tokens, loss_mask = examples.document(index)
        assert not loss_mask[0]
        assert loss_mask.any()
        found.append(
            tuple(plain.decode(ids.tolist(), skip_special_tokens=False)
                  for ids in (tokens, tokens[loss_mask]))
        )  # fmt: skip
    return found  # type: ignore[return-value]


# What is encoded


def test_prompts_and_completions(quick: Path, tokenizer: Path) -> None:
    manifest = make(jsonl(quick / "a.jsonl", *PAIRS), quick / "out", tokenizer, template=None)
    end = "<|endoftext|>"
    assert texts(quick / "out", tokenizer) == [
        (each["prompt"] + each["completion"] + end, each["completion"] + end) for each in PAIRS
    ]
    from tokenizers import Tokenizer

    # A marker in the text is text: its id isn't there
    marker = Tokenizer.from_file(str(tokenizer)).token_to_id("<|im_end|>")
    dataset = open_dataset(quick / "out")
    train = dataset.splits["train"]
    tokens = np.load(quick / "out" / "train-00000.npy")
    assert marker not in tokens
    assert dataset.tokenizer_file.read_text() == Tokenizer.from_file(str(tokenizer)).to_str(True)
    assert tokens.dtype == np.uint16
    assert (tokens[train.offsets[1:] - 1] == manifest.eos_id).all()
    counted = manifest.splits["train"]
    assert (counted.documents, counted.tokens) == (40, len(tokens))
    assert counted.loss_tokens == np.load(quick / "out" / "train-loss-mask.npy").sum()
    assert counted.bytes == sum(len(each["completion"].encode()) for each in PAIRS)
    assert manifest.splits["val"].documents == 0
    assert dataset.splits["val"].offsets.tolist() == [0]
    assert is_dataset(quick / "out")
    assert not is_dataset(quick)


def test_conversations(quick: Path, tokenizer: Path) -> None:
    records = [*TALKS[:-1], {"conversations": TALKS[-1]["messages"]}]
    manifest = make(jsonl(quick / "a.jsonl", *records), quick / "out", tokenizer)
    expected = []
    for i in range(10):
        answers = (f"{i + 1}!<|im_end|>\n", f"Then {i + 2}.<|im_end|>\n")
        turns = (
            "<|im_start|>system\nYou count.<|im_end|>\n",
            f"<|im_start|>user\n{i}?<|im_end|>\n<|im_start|>assistant\n{answers[0]}",
            f"<|im_start|>user\nand then?<|im_end|>\n<|im_start|>assistant\n{answers[1]}",
        )
        expected.append(("".join(turns), "".join(answers)))
    assert texts(quick / "out", tokenizer) == expected
    assert manifest.splits["train"].bytes == sum(len(counted) for _, counted in expected)
    from tokenizers import Tokenizer

    marker = Tokenizer.from_file(str(tokenizer)).token_to_id("<|im_end|>")
    tokens = np.load(quick / "out" / "train-00000.npy")
    assert (tokens == marker).sum() == 5 * 10  # here it is the token
    assert manifest.chat_template == CHATML


def test_ids_are_those_of_each_part_by_itself(quick: Path, tokenizer: Path) -> None:
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(tokenizer))
    # Encoded as one text, "some te|xt" would share a token
    source = jsonl(quick / "a.jsonl", {"prompt": "some te", "completion": "xt"})
    make(source, quick / "out", tokenizer)
    tokens, loss_mask = open_dataset(quick / "out").splits["train"].document(0)
    ids = [plain.encode(part).ids for part in ("some te", "xt", "<|endoftext|>")]
    assert tokens.tolist() == [*ids[0], *ids[1], *ids[2]]
    assert tokens.tolist() != plain.encode("some text<|endoftext|>").ids
    assert loss_mask.tolist() == [False] * len(ids[0]) + [True] * (len(ids[1]) + 1)


def test_what_follows_the_last_answer_is_left_out(quick: Path, tokenizer: Path) -> None:
    longer = {"messages": [*TALKS[0]["messages"], {"role": "user", "content": "thanks"}]}
    make(jsonl(quick / "a.jsonl", longer, TALKS[0]), quick / "out", tokenizer)
    first, second = texts(quick / "out", tokenizer)
    assert first == second


def test_first_tokens_are_never_trained(quick: Path, tokenizer: Path) -> None:
    source = jsonl(quick / "a.jsonl", {"prompt": "", "completion": "text"})
    make(source, quick / "out", tokenizer)
    tokens, loss_mask = open_dataset(quick / "out").splits["train"].document(0)
    assert loss_mask.tolist() == [False] + [True] * (len(tokens) - 1)


def test_one_content_in_every_kind_of_source(quick: Path, tokenizer: Path) -> None:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = jsonl(quick / "a.jsonl", *TALKS)
    (quick / "b.jsonl.gz").write_bytes(gzip.compress((quick / "a.jsonl").read_bytes()))
    # A key that some messages don't have is null in a table, and must not reach the template
    table = pa.Table.from_pylist([*TALKS, {"messages": [{"name": "x"}], "other": 1}])[:10]
    assert table["messages"][0][0]["name"].as_py() is None
    pq.write_table(table, quick / "c.parquet", row_group_size=3)
    datasets.Dataset(table).save_to_disk(quick / "d")
    datasets.DatasetDict({"sft": datasets.Dataset(table)}).save_to_disk(quick / "e")
    template = CHATML.replace("message['content']", "message['content'] ~ message.name")
    prints = {
        make(source, quick / f"out-{i}", tokenizer, template, 0.2).fingerprint
        for i, source in enumerate(
            [
                plain,
                Source("jsonl", (str(quick / "b.jsonl.gz"),)),
                Source("parquet", (str(quick / "c.parquet"),)),
                Source("huggingface", (str(quick / "d"),)),
                Source("huggingface", (str(quick / "e"),), split="sft"),
            ]
        )
    }
    assert len(prints) == 1
    assert "None" not in texts(quick / "out-2", tokenizer)[0][0]


# Validation, and the same again


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.001, 1), (0.25, 10), (0.99, 39)])
def test_validation_is_a_share_by_content(
    quick: Path, tokenizer: Path, fraction: float, expected: int
) -> None:
    make(jsonl(quick / "a.jsonl", *PAIRS), quick / "one", tokenizer, None, fraction)
    make(jsonl(quick / "b.jsonl", *reversed(PAIRS)), quick / "two", tokenizer, None, fraction)
    train, val = (texts(quick / "one", tokenizer, split) for split in ("train", "val"))
    assert len(val) == expected
    assert sorted(train + val) == sorted(
        (e["prompt"] + e["completion"] + "<|endoftext|>", e["completion"] + "<|endoftext|>")
        for e in PAIRS
    )
    assert train == texts(quick / "two", tokenizer)[::-1]
    assert val == texts(quick / "two", tokenizer, "val")[::-1]


def test_equal_examples_go_to_the_same_side(quick: Path, tokenizer: Path) -> None:
    make(jsonl(quick / "a.jsonl", *(PAIRS[:5] * 3)), quick / "out", tokenizer, None, 0.4)
    train, val = (texts(quick / "out", tokenizer, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (9, 6)
    assert not set(train) & set(val)
    make(jsonl(quick / "b.jsonl", *(PAIRS[:1] * 3)), quick / "same", tokenizer, None, 0.4)
    assert len(texts(quick / "same", tokenizer)) == 3  # nothing else is left to train on


def test_two_runs_make_the_same_bytes(quick: Path, tokenizer: Path) -> None:
    source = jsonl(quick / "a.jsonl", *PAIRS, *TALKS)
    made = [make(source, quick / name / "out", tokenizer, CHATML, 0.2) for name in "ab"]
    assert made[0].fingerprint == made[1].fingerprint
    files = sorted(os.listdir(quick / "a" / "out"))
    assert files == sorted([*FILES, "dataset.json", "tokenizer.json"])
    for file in files:
        assert (quick / "a" / "out" / file).read_bytes() == (quick / "b/out" / file).read_bytes()
    assert os.listdir(quick / "a") == ["out"]


def test_a_finished_dataset_is_returned(quick: Path, tokenizer: Path) -> None:
    source = jsonl(quick / "a.jsonl", *PAIRS)
    first = make(source, quick / "out", tokenizer, val_fraction=0.2)
    before = {file: file.stat().st_mtime_ns for file in (quick / "out").iterdir()}
    assert make(source, quick / "out", tokenizer, val_fraction=0.2) == first
    assert before == {file: file.stat().st_mtime_ns for file in (quick / "out").iterdir()}
    with pytest.raises(UserError, match=r"other settings \(val_fraction: 0.2 -> 0.1\): choose"):
        make(source, quick / "out", tokenizer, val_fraction=0.1)
    with pytest.raises(UserError, match=r"other settings \(chat_template: ") as caught:
        make(source, quick / "out", tokenizer, CHATML + "\n", 0.2)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="files have other names or sizes"):
        make(jsonl(quick / "a.jsonl", *PAIRS[1:]), quick / "out", tokenizer, val_fraction=0.2)


def test_what_is_there_is_not_overwritten(quick: Path, tokenizer: Path) -> None:
    source = jsonl(quick / "a.jsonl", *PAIRS)
    (quick / "out").mkdir()
    make(source, quick / "out", tokenizer)  # an empty directory is as good as none
    (quick / "mine").mkdir()
    (quick / "mine" / "thesis.txt").write_text("x")
    for out in (quick / "mine", quick / "a.jsonl"):
        with pytest.raises(UserError, match="holds something else"):
            make(source, out, tokenizer)
    assert (quick / "mine" / "thesis.txt").read_text() == "x"


# Others at work, and kills


def test_another_process_is_not_disturbed(quick: Path, tokenizer: Path) -> None:
    source = jsonl(quick / "a.jsonl", *PAIRS)
    work = quick / ".out.unfinished"
    work.mkdir()
    (work / "tokens.spool").write_text("half")
    with (work / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"another process is making .*/out: wait"):
            make(source, quick / "out", tokenizer)
    assert (work / "tokens.spool").exists()
    make(source, quick / "out", tokenizer)  # it is gone now, and what it left is removed
    assert not work.exists()
    assert list(verify_dataset(quick / "out")) == []


def test_a_killed_run_leaves_nothing_behind_that_harms(quick: Path, tokenizer: Path) -> None:
    source = jsonl(quick / "a.jsonl", *PAIRS)
    jsonl(quick / "b.jsonl", "{")  # of which it warns, and waits for ever
    code = (
        "import signal, sys\n"
        "from minigpt_cli.prepare.instructions import make_instructions\n"
        "from minigpt_cli.prepare.sources import Source\n"
        "folder, tokenizer = sys.argv[1:]\n"
        "source = Source('jsonl', (f'{folder}/a.jsonl', f'{folder}/b.jsonl'))\n"
        "make_instructions(source, f'{folder}/out', tokenizer_path=tokenizer, chat_template=None,\n"
        "                  variables={}, val_fraction=0.0, warn=lambda _: signal.pause())"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(quick), str(tokenizer)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        deadline = time.monotonic() + 60
        while not (quick / ".out.unfinished" / "tokens.spool").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (quick / "out").exists()
    assert (quick / ".out.unfinished").exists()
    make(source, quick / "out", tokenizer)
    assert not (quick / ".out.unfinished").exists()
    assert list(verify_dataset(quick / "out")) == []


def test_a_failure_leaves_nothing(quick: Path, tokenizer: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl:41 holds a conversation, .*--chat-template"):
        make(jsonl(quick / "a.jsonl", *PAIRS, TALKS[0]), quick / "out", tokenizer, None)
    assert sorted(os.listdir(quick)) == ["a.jsonl"]


# Bad input


BAD = [
    ("{", "not valid JSON"),
    ("[1", "not valid JSON"),
    ('"text"', "not a JSON object but str"),
    ("[" * 100_000, "nested too deeply|not valid JSON"),
    ({"text": "x"}, r"needs 'prompt' and 'completion', or 'messages' \(fields: 'text'\)"),
    ({"prompt": "x"}, "needs 'prompt' and 'completion'"),
    ({"prompt": 5, "completion": "x"}, "'prompt' is not a string but int"),
    ({"prompt": "x", "completion": ["y"]}, "'completion' is not a string but list"),
    ({"prompt": "x", "completion": ""}, "'completion' is empty"),
    ({"prompt": "x", "completion": "\ud800"}, "half of a surrogate pair"),
    ({"messages": "x"}, "'messages' is not a list but str"),
    ({"messages": []}, "no message of the role 'assistant'"),
    ({"messages": [{"role": "user", "content": "x"}]}, "no message of the role 'assistant'"),
    ({"messages": ["x"]}, "message 0 is not an object but str"),
    ({"messages": [{"role": "assistant"}]}, "'content' of message 0 is missing"),
    (
        {
            "messages": [
                {"role": "user", "content": ""},
                {"role": "assistant", "content": "", "tool_calls": []},
            ]
        },
        "'content' of message 1 is empty",
    ),
    ({"messages": [{"content": "x"}]}, "'role' of message 0 is missing"),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "text"}]}]},
        "'content' of message 0 is not a string but list",
    ),
    ({"messages": [{"from": "human", "value": "x"}]}, "'role' of message 0 is missing"),
]


@pytest.mark.parametrize(("record", "message"), BAD)
def test_a_malformed_record_is_skipped_and_named(
    quick: Path, tokenizer: Path, record: Any, message: str
) -> None:
    import re

    warnings: list[str] = []
    source = jsonl(quick / "a.jsonl", PAIRS[0], "", record, PAIRS[1])
    manifest = make(source, quick / "out", tokenizer, warnings=warnings)
    assert manifest.bad_lines == 1
    assert manifest.splits["train"].documents == 2
    (line,) = warnings
    assert re.search(rf"a\.jsonl:3: .*({message}).*; skipped$", line)
    assert "\n" not in line


def test_template_refuses_a_conversation(quick: Path, tokenizer: Path) -> None:
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    warnings: list[str] = []
    without = {"messages": TALKS[0]["messages"][1:]}
    source = jsonl(quick / "a.jsonl", without, TALKS[1])
    assert make(source, quick / "out", tokenizer, template + CHATML, 0, warnings).bad_lines == 1
    assert warnings == [
        f"{quick}/a.jsonl:1: the chat template refuses a conversation: no system; skipped"
    ]
    with pytest.raises(UserError, match="can't be parsed"):
        make(source, quick / "other", tokenizer, "{% for %}")


def test_nothing_to_train_on_is_malformed(quick: Path, tokenizer: Path) -> None:
    from tokenizers import Tokenizer, normalizers

    silent = Tokenizer.from_file(str(tokenizer))
    silent.normalizer = normalizers.Strip()
    silent.save(str(quick / "tokenizer.json"))
    alone = {"messages": [{"role": "assistant", "content": "x"}]}
    source = jsonl(quick / "a.jsonl", PAIRS[0], {"prompt": "a", "completion": "  "}, alone)
    warnings: list[str] = []
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # one token, the first
    manifest = make(source, quick / "out", quick / "tokenizer.json", template, 0, warnings)
    assert manifest.splits["train"].documents == 1
    assert warnings == [f"{quick}/a.jsonl:{n}: has no token to train on; skipped" for n in (2, 3)]


def test_only_the_first_malformed_records_are_shown(quick: Path, tokenizer: Path) -> None:
    warnings: list[str] = []
    source = jsonl(quick / "a.jsonl", *["{"] * 30, PAIRS[0])
    assert make(source, quick / "out", tokenizer, warnings=warnings).bad_lines == 30
    assert len(warnings) == 21


def test_bad_sources_are_refused_in_one_line(quick: Path, tokenizer: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["x"], "prompt": ["y"]}), quick / "a.parquet")
    (quick / "b.parquet").write_text("no parquet")
    (quick / "c.txt").write_text("text")
    (quick / "d.jsonl").write_text("[\n" + json.dumps(PAIRS[0]) + "]")
    for name, kind, message in (
        ("a.parquet", "parquet", r"a\.parquet needs columns 'prompt' .*; it has text, prompt"),
        ("b.parquet", "parquet", r"b\.parquet is not a Parquet file"),
        ("c.txt", "files", "source of kind files: give JSON lines, Parquet"),
        ("d.jsonl", "jsonl", "is a JSON array, not JSON lines"),
        ("missing.jsonl", "jsonl", "no such file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            make(Source(kind, (str(quick / name),)), quick / "out", tokenizer)
        assert "\n" not in str(caught.value)
    nothing = r"no instructions found in .*e\.jsonl; everything was skipped, first .*:1: not valid"
    with pytest.raises(UserError, match=nothing):
        make(jsonl(quick / "e.jsonl", "{", "5"), quick / "out", tokenizer, warnings=[])
    with pytest.raises(UserError, match=r"no instructions found in .*f\.jsonl$"):
        make(jsonl(quick / "f.jsonl"), quick / "out", tokenizer)
    with pytest.raises(UserError, match="val_fraction must be"):
        make(jsonl(quick / "g.jsonl", *PAIRS), quick / "out", tokenizer, val_fraction=1.0)
    with pytest.raises(UserError, match="no tokenizer at"):
        make(jsonl(quick / "g.jsonl", *PAIRS), quick / "out", quick / "nowhere")
    assert not (quick / "out").exists()


# Damage


@pytest.fixture
def dataset(quick: Path, tokenizer: Path) -> Path:
    make(jsonl(quick / "a.jsonl", *PAIRS), quick / "out", tokenizer, None, 0.2)
    return quick / "out"


@pytest.mark.parametrize("file", [*FILES, "tokenizer.json", "dataset.json"])
def test_damage_of_each_file_is_found_and_named(dataset: Path, file: str) -> None:
    whole = (dataset / file).read_bytes()
    assert list(verify_dataset(dataset)) == []

    def found(verify: bool) -> None:
        assert list(verify_dataset(dataset)) == [file]
        with pytest.raises(Damaged, match=f"{file}: .*(restore|again)"):
            open_dataset(dataset, verify=verify)

    (dataset / file).write_bytes(whole[:-9])
    found(verify=False)
    middle = len(whole) - 9  # among the data
    (dataset / file).write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    found(verify=True)
    if file != "dataset.json":
        (dataset / file).unlink()
        found(verify=False)
    (dataset / file).write_bytes(whole)
    assert list(verify_dataset(dataset)) == []


def test_invalid_offsets(dataset: Path) -> None:
    offsets = np.load(dataset / "train-offsets.npy", mmap_mode="r+")
    offsets[3] = offsets[2]
    offsets.flush()
    with pytest.raises(Damaged, match=r"train-offsets\.npy: its offsets don't divide"):
        open_dataset(dataset)


def test_an_entry_that_is_missing_is_damage(dataset: Path) -> None:
    record = json.loads((dataset / "dataset.json").read_bytes())
    del record["checksum"], record["eos_id"]
    record["checksum"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (dataset / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(Damaged, match=r"dataset\.json: an entry is missing.*eos_id"):
        open_dataset(dataset)


def old_format(dataset: Path) -> None:
    """Turn a dataset into one with ``instructions.json``, as versions before format 2 made it."""
    record = json.loads((dataset / "dataset.json").read_bytes())
    del record["checksum"], record["source_fingerprint"]
    record["malformed"] = record.pop("bad_lines")
    record.setdefault("chat_template", None)
    record["format"] = 1
    for name, split in record["splits"].items():
        files = [*split["shards"], split["loss_mask"], split["offsets"]]
        for file, array in zip(files, ("tokens", "trained", "offsets"), strict=True):
            (dataset / file["file"]).rename(dataset / f"{name}-{array}.npy")
            file["file"] = f"{name}-{array}.npy"
        record["splits"][name] = {
            "files": files,
            "examples": split["documents"],
            "tokens": split["tokens"],
            "trained_tokens": split["loss_tokens"],
            "trained_bytes": split["bytes"],
        }
    record["checksum"] = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (dataset / "dataset.json").unlink()
    (dataset / "instructions.json").write_text(json.dumps(record, indent=1))


def test_a_dataset_of_the_old_format_is_read(dataset: Path, quick: Path, tokenizer: Path) -> None:
    new = open_dataset(dataset, verify=True).manifest
    before = [texts(dataset, tokenizer, split) for split in ("train", "val")]
    old_format(dataset)
    assert is_dataset(dataset)
    old = open_dataset(dataset, verify=True).manifest
    assert old.fingerprint == new.fingerprint
    assert [texts(dataset, tokenizer, split) for split in ("train", "val")] == before
    for split in ("train", "val"):
        assert old.splits[split].bytes_per_token == new.splits[split].bytes_per_token
    assert list(verify_dataset(dataset)) == []
    # The same command finds it finished
    assert make(jsonl(quick / "a.jsonl", *PAIRS), dataset, tokenizer, None, 0.2) == old
    (dataset / "train-trained.npy").unlink()
    assert list(verify_dataset(dataset)) == ["train-trained.npy"]
    (dataset / "instructions.json").write_text("{}")
    assert list(verify_dataset(dataset)) == ["instructions.json"]
    with pytest.raises(Damaged, match=r"instructions\.json: .*delete .* and make it again"):
        open_dataset(dataset)


def test_a_large_vocabulary_takes_uint32(quick: Path) -> None:
    from tokenizers import AddedToken

    large = train_bpe(iter(["some text " * 9]), 280)
    large.add_tokens([AddedToken(f"<{i}>") for i in range(65_400)])
    large.save(str(quick / "tokenizer.json"))
    source = jsonl(quick / "a.jsonl", {"prompt": "x", "completion": "<65399>"})
    manifest = make(source, quick / "out", quick / "tokenizer.json")
    assert manifest.dtype == "uint32"
    tokens, _ = open_dataset(quick / "out", verify=True).splits["train"].document(0)
    assert tokens[1] == manifest.vocab_size - 1 > 65_535
