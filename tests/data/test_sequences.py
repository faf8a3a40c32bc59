"""Datasets opened for training and for evaluation: every target once, and counts by hand."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minigpt_cli.core.errors import UserError
from minigpt_cli.data.dataset import open_dataset, split_in_memory
from minigpt_cli.data.loader import TokenSequences
from minigpt_cli.data.sequences import EvalData, open_data, open_eval_sequences
from minigpt_cli.prepare.bpe import train_bpe
from minigpt_cli.prepare.instructions import make_instructions
from minigpt_cli.prepare.sources import Source
from minigpt_cli.prepare.tokenize import tokenize
from minigpt_cli.recipe import Recipe, parse_recipe
from tests.helpers.recipes import TINY

PAIRS = [(f"What is {i}?", " It is." * (1 + i % 7)) for i in range(40)]


def recipe_for(data: Path, *overrides: str) -> Recipe:
    return parse_recipe(TINY.format(data=data), list(overrides), name="tiny")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(iter(["What is it? It is some text. " * 9]), 300).save(str(file))
    return file


@pytest.fixture
def instructions(quick: Path, tokenizer: Path) -> Path:
    records = [json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in PAIRS]
    (quick / "a.jsonl").write_text("".join(records))
    make_instructions(
        Source("jsonl", (str(quick / "a.jsonl"),)),
        quick / "instructions",
        tokenizer_path=tokenizer,
        chat_template=None,
        variables={},
        val_fraction=0.25,
        warn=pytest.fail,
    )
    return quick / "instructions"


@pytest.fixture
def text(quick: Path, tokenizer: Path) -> Path:
    (quick / "a.txt").write_text("It is some text, or is it? " * 400)
    source = Source("files", (str(quick / "a.txt"),))
    tokenize(source, quick / "text", tokenizer_path=tokenizer, val_fraction=0.2, workers=1)
    return quick / "text"


@given(tokens=st.integers(0, 200), length=st.integers(1, 60), batch=st.integers(1, 5))
def test_every_target_of_a_text_once_in_order(tokens: int, length: int, batch: int) -> None:
    stream = np.random.default_rng(tokens).integers(0, 500, tokens)
    split = split_in_memory(stream, vocab_size=500, eos_id=0)
    batches = list(EvalData(TokenSequences(split, length), 1.0).batches(batch))
    assert all(len(inputs) <= batch and inputs.shape[1] <= length for inputs, _, _ in batches)
    assert all(segment_ids is None for _, _, segment_ids in batches)
    none = np.array([], dtype=np.int64)
    inputs, targets = (np.concatenate([none, *(b[i].ravel() for b in batches)]) for i in (0, 1))
    assert np.array_equal(inputs, stream[:-1])
    assert np.array_equal(targets, stream[1:])


def test_instructions_count_completions_once(instructions: Path) -> None:
    dataset = open_dataset(instructions)
    fingerprint = dataset.manifest.tokenizer_fingerprint
    data = open_eval_sequences(instructions, "val", 64, fingerprint)
    counted: Counter[int] = Counter()
    for _, targets, segment_ids in data.batches(3):
        assert segment_ids is not None
        counted.update(targets[targets != -100].tolist())
    tokens = np.load(instructions / "val-00000.npy")[np.load(instructions / "val-loss-mask.npy")]
    assert counted == Counter(tokens.tolist())
    train = open_eval_sequences(instructions, "train", 64, fingerprint)
    tokens = [np.load(instructions / f"{s}-loss-mask.npy").sum() for s in ("train", "val")]
    sizes = [each.bytes_per_token * n for each, n in zip((train, data), tokens, strict=True)]
    assert sum(sizes) == pytest.approx(sum(len(completion) for _, completion in PAIRS))


def test_evaluation_refuses_other_data(instructions: Path, text: Path) -> None:
    fingerprint = open_dataset(text).manifest.tokenizer_fingerprint
    for path, split, length, tokenizer, message in (
        (text, "test", 8, fingerprint, "has no split test, but train, val"),
        (text, "val", 8, "0" * 64, "made with another tokenizer"),
        (instructions, "val", 3, fingerprint, "at least an example of at most 3 tokens"),
    ):
        with pytest.raises(UserError, match=message):
            open_eval_sequences(path, split, length, tokenizer)


def test_training_data_of_a_text(text: Path) -> None:
    data = open_data(recipe_for(text, "train.sequence_length=16"))
    stream = np.concatenate([np.load(file) for file in sorted(text.glob("train-*.npy"))])
    assert data.train.num_sequences == (len(stream) - 1) // 16
    inputs, targets, segment_ids = data.train.gather(np.array([2, 0]))
    assert np.array_equal(inputs, np.stack([stream[32:48], stream[:16]]))
    assert np.array_equal(targets, np.stack([stream[33:49], stream[1:17]]))
    assert segment_ids is None
    val = np.load(text / "val-00000.npy")
    whole = len((text.parent / "a.txt").read_bytes())
    manifest = open_dataset(text).manifest
    assert data.bytes_per_token == (whole - manifest.splits["train"].bytes) / len(val)
    assert data.fingerprints == {
        "tokenizer": manifest.tokenizer_fingerprint,
        "content": manifest.fingerprint,
    }


def test_too_little_data_to_train_on(text: Path, instructions: Path) -> None:
    for path, length, message in (
        (text, 100_000, r"train.sequence_length 100000, its [\d,]+ tokens are too few"),
        (
            instructions,
            3,
            "no sequence of train.sequence_length 3, all its 30 examples are longer "
            r"\(\d+ to \d+ tokens\)",
        ),
    ):
        sizes = (f"train.sequence_length={length}", f"model.max_position_embeddings={length}")
        with pytest.raises(UserError, match=message):
            open_data(recipe_for(path, *sizes))


def test_no_validation_is_a_warning(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = len(np.load(text / "val-00000.npy"))
    data = open_data(
        recipe_for(
            text,
            f"train.sequence_length={tokens}",
            f"model.max_position_embeddings={tokens}",
        )
    )
    assert data.val is None
    assert "the validation split has no sequence" in capsys.readouterr().err
