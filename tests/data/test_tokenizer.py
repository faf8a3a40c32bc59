"""Tokenizers: training, loading, identity, and text that looks like a special token."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from minigpt_cli.core.errors import UserError
from minigpt_cli.data.tokenizer import (
    EOS,
    eos_id,
    load_tokenizer,
    token_byte_lengths,
    tokenizer_fingerprint,
    vocabulary_size,
)
from minigpt_cli.huggingface.check_export import TEXT
from minigpt_cli.prepare.bpe import train_bpe

REPOSITORY = Path(__file__).resolve().parents[2]
GPT2 = REPOSITORY.parent / "shared" / "data" / "gpt2"
needs_gpt2 = pytest.mark.skipif(not GPT2.exists(), reason="needs ../shared/data/gpt2")

MULTILINGUAL = """The quick brown fox's 3 foxes don't jump.  Two  spaces,\ttabs\r\n\r\nand lines.
Zażółć gęślą jaźń. Съешь же ещё этих мягких французских булок. 我能吞下玻璃而不伤身体。
مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดีชาวโลก 👩‍👩‍👧‍👦🏳️‍🌈 🇵🇱 e\u0301 \u00a0\u3000 \u200b
def f(x):\n    return x ** 2  # naïve\n"""


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_bpe(iter([MULTILINGUAL * 3, "low lower lowest " * 50]), 400)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_trained_vocabulary_counts_eos_and_all_bytes(small: Tokenizer) -> None:
    assert vocabulary_size(small) == 400
    assert small.token_to_id(EOS) == eos_id(small)
    every_byte = bytes(range(256)).decode("latin-1")
    assert small.decode(encode(small, every_byte)) == every_byte


@given(st.text())
def test_every_text_comes_back(small: Tokenizer, text: str) -> None:
    assert small.decode(encode(small, text), skip_special_tokens=False) == text


def test_a_larger_vocabulary_never_encodes_longer() -> None:
    text = MULTILINGUAL * 20
    sizes = [len(encode(train_bpe(iter([text]), size), text)) for size in (257, 300, 400, 600)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == len(text.encode())
    assert sizes[-1] < sizes[0] / 2


def test_training_is_the_same_in_another_process(tmp_path: Path) -> None:
    code = (
        "import sys; from minigpt_cli.prepare.bpe import train_bpe\n"
        "from minigpt_cli.data.tokenizer import tokenizer_fingerprint\n"
        "texts = open(sys.argv[1]).read().split('|')\n"
        "print(tokenizer_fingerprint(train_bpe(iter(texts), 500)))"
    )
    file = tmp_path / "texts"
    source = (REPOSITORY / "minigpt_cli/data/tokenizer.py").read_text().replace("|", " ")
    file.write_text(source + "|" + MULTILINGUAL + "|" + source)
    runs = {
        subprocess.run(
            [sys.executable, "-c", code, str(file)],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    here = tokenizer_fingerprint(train_bpe(iter(file.read_text().split("|")), 500))
    assert runs == {here + "\n"}


def test_training_uses_only_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minigpt_cli.prepare.bpe.TRAINING_BYTES", 1000)
    taken = 0

    def texts():
        nonlocal taken
        for _ in range(100):
            taken += 1
            yield "word " * 50

    train_bpe(texts(), 260)
    assert taken == 4


def test_training_on_text_without_spaces() -> None:
    tokenizer = train_bpe(iter(["ab" * 1_000_000]), 300)
    assert tokenizer.token_to_id("abab") is not None


def test_too_small_vocabulary() -> None:
    train_bpe(iter(["a"]), 257)
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(iter(["a"]), 256)


def test_special_token_name_in_text(small: Tokenizer, tmp_path: Path) -> None:
    small.save(str(tmp_path / "tokenizer.json"))
    for tokenizer in (small, load_tokenizer(tmp_path)):
        ids = encode(tokenizer, f"a{EOS}b")
        assert eos_id(tokenizer) not in ids
        assert tokenizer.decode(ids) == f"a{EOS}b"
        batch = tokenizer.encode_batch_fast([f"a{EOS}b"], add_special_tokens=False)
        assert batch[0].ids == ids


def test_truncation_padding_and_bos_are_off(small: Tokenizer, tmp_path: Path) -> None:
    other = Tokenizer.from_str(small.to_str())
    other.enable_truncation(4)
    other.enable_padding(length=64)
    other.post_processor = processors.TemplateProcessing(
        single=f"{EOS} $A", special_tokens=[(EOS, eos_id(small))]
    )
    other.save(str(tmp_path / "tokenizer.json"))
    assert len(other.encode("x").ids) == 64  # it does pad, and it would add the special token
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    for text in ("x", MULTILINGUAL):  # shorter than the padding, longer than the truncation
        assert encode(loaded, text) == encode(small, text)


@needs_gpt2
@pytest.mark.parametrize("path", [GPT2, GPT2 / "vocab.json"])
def test_gpt2_gives_the_ids_of_transformers(path: Path) -> None:
    from transformers import GPT2TokenizerFast

    oracle = GPT2TokenizerFast(str(GPT2 / "vocab.json"), str(GPT2 / "merges.txt"))
    tokenizer = load_tokenizer(path)
    assert vocabulary_size(tokenizer) == 50257
    assert eos_id(tokenizer) == 50256
    for text in (MULTILINGUAL, *MULTILINGUAL.splitlines(), " ", "\n\n", "👍🏽" * 9, "x" * 999):
        assert encode(tokenizer, text) == oracle(text)["input_ids"]


@needs_gpt2
def test_gpt2_gives_the_ids_of_its_own_encoder() -> None:
    """Against the algorithm of OpenAI's encoder.py and of tiktoken, written out: pieces by a
    pattern, bytes as characters, then the merge of the lowest rank again and again."""
    vocab = json.loads((GPT2 / "vocab.json").read_text())
    lines = (GPT2 / "merges.txt").read_text().splitlines()[1:]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    letters |= {byte: chr(256 + number) for number, byte in enumerate(others)}
    pattern = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )

    def oracle(text: str) -> list[int]:
        ids = []
        for piece in pattern.findall(text):
            word = [letters[byte] for byte in piece.encode()]
            while pairs := [p for p in itertools.pairwise(word) if p in ranks]:
                first = min(pairs, key=ranks.__getitem__)
                at = list(itertools.pairwise(word)).index(first)
                word[at : at + 2] = ["".join(first)]
            ids += [vocab[part] for part in word]
        return ids

    tokenizer = load_tokenizer(GPT2)
    assert encode(tokenizer, "Hello world") == [15496, 995]  # as tiktoken says
    emoji = "👍🏽👩‍👩‍👧 naïve 東京 \r\n\t x"
    for text in (MULTILINGUAL, TEXT, emoji, "don't  we'll   12345 ¿qué?"):
        assert encode(tokenizer, text) == oracle(text)


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "missing")
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    for content in ("", "{", '{"version": "1.0"}', "[]", '{"model": {"type": "Unknown"}}'):
        file = tmp_path / "tokenizer.json"
        file.write_text(content)
        with pytest.raises(UserError, match=r"tokenizer\.json is not a valid tokenizer"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text("{")
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(UserError, match=r"vocab\.json is not a valid tokenizer"):
        load_tokenizer(tmp_path)


def test_end_of_text_by_other_names_or_none() -> None:
    assert eos_id(Tokenizer(models.WordLevel({"a": 0, "</s>": 1}))) == 1
    assert eos_id(Tokenizer(models.WordLevel({EOS: 5, "</s>": 1}))) == 5
    with pytest.raises(UserError, match="no end-of-text token"):
        eos_id(Tokenizer(models.WordLevel({"a": 0})))


def test_fingerprint(small: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(small.to_str(pretty=True))
    assert tokenizer_fingerprint(load_tokenizer(file)) == tokenizer_fingerprint(small)
    # An older file: merges as strings, padding set, keys in another order, options not written.
    record = json.loads(small.to_str())
    record["model"]["merges"] = [" ".join(pair) for pair in record["model"]["merges"]]
    record["model"] = {
        key: value
        for key, value in reversed(record["model"].items())
        if value is not None and key != "ignore_merges"
    }
    record["padding"] = None
    file.write_text(json.dumps(record))
    assert tokenizer_fingerprint(load_tokenizer(file)) == tokenizer_fingerprint(small)
    for section, key in (("model", "merges"), ("pre_tokenizer", "add_prefix_space")):
        changed = json.loads(small.to_str())
        value = changed[section][key]
        changed[section][key] = value[:-1] if isinstance(value, list) else not value
        file.write_text(json.dumps(changed))
        assert tokenizer_fingerprint(load_tokenizer(file)) != tokenizer_fingerprint(small), section
    swapped = json.loads(small.to_str())
    vocab = swapped["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(swapped))
    assert tokenizer_fingerprint(load_tokenizer(file)) != tokenizer_fingerprint(small)


def test_byte_lengths_add_up_to_the_text(small: Tokenizer) -> None:
    lengths = token_byte_lengths(small)
    assert lengths is not None
    assert lengths.dtype == np.int32
    assert lengths.shape == (vocabulary_size(small),)
    assert lengths[eos_id(small)] == 0
    assert lengths[encode(small, MULTILINGUAL)].sum() == len(MULTILINGUAL.encode())


def test_byte_lengths_of_added_tokens_and_other_kinds(small: Tokenizer) -> None:
    tokenizer = Tokenizer.from_str(small.to_str())
    tokenizer.encode_special_tokens = True
    tokenizer.add_tokens(["<tool żółw>"])
    lengths = token_byte_lengths(tokenizer)
    assert lengths is not None
    text = "call <tool żółw> now"
    assert tokenizer.token_to_id("<tool żółw>") in encode(tokenizer, text)
    assert lengths[encode(tokenizer, text)].sum() == len(text.encode())
    words = Tokenizer(models.WordLevel({"a": 0}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert token_byte_lengths(words) is None
    words.decoder = decoders.Metaspace()
    assert token_byte_lengths(words) is None


@needs_gpt2
def test_byte_lengths_of_gpt2() -> None:
    tokenizer = load_tokenizer(GPT2)
    lengths = token_byte_lengths(tokenizer)
    assert lengths is not None
    assert lengths[encode(tokenizer, MULTILINGUAL)].sum() == len(MULTILINGUAL.encode())
    assert (lengths == 0).sum() == 1
