"""Hostile and broken templates and tokenizers: one line, soon, and in little memory."""

import copy
import json
import os
import pickle
import re
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from minigpt_cli.core import child
from minigpt_cli.core.child import Refusal
from minigpt_cli.core.errors import UserError
from minigpt_cli.data import untrusted
from minigpt_cli.data.chat import CHATML, masked_parts, render
from minigpt_cli.data.tokenizer import load_tokenizer, recognising_special_tokens, vocabulary_size
from minigpt_cli.data.untrusted import ConfinedTokenizer
from minigpt_cli.prepare.bpe import train_bpe
from minigpt_cli.prepare.sources import Source
from minigpt_cli.prepare.tokenize import tokenize
from tests.helpers.documents import json_lines

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TIME, MEMORY = "takes more than 1 seconds", "takes more than 2 GB of memory"
EITHER = f"{TIME}|{MEMORY}"  # as fast as the machine is
PARTS: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                      "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True,
                "use_regex": True},
    "added_tokens": [{"id": 2, "content": "<|endoftext|>", "single_word": False, "lstrip": False,
                      "rstrip": False, "normalized": False, "special": True}],
    "model": {"type": "BPE", "dropout": None, "unk_token": None,
              "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
              "byte_fallback": False, "vocab": {"a": 0, "b": 1, "<|endoftext|>": 2}, "merges": []},
}  # fmt: skip
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
LONGER = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "SECONDS", 1)


def written(file: Path, **changed: Any) -> Path:
    file.write_text(json.dumps(PARTS | changed))
    return file


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),  # Jinja's own limit
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", TIME),
        ("{{ 'a' * 10**10 }}", MEMORY),
        ("{% set n = 10**10 %}{{ messages[0].content * n }}", MEMORY),
        ("{{ 'a' | center(10**10) }}", MEMORY),
        ("{{ ('a\n' * 10**7) | indent(10**3) }}", EITHER),
        ("{{ (['a' * 10**6] * 10**6) | join('b') }}", EITHER),
        ("{{ '%10000000000d' % 1 }}", MEMORY),
        ("{{ 'a' * 10**8 }}", "100,000,000 characters"),
        ("{{ 10**100000 }}", "Exceeds the limit"),
        ("{{ 10**(10**9) }}", EITHER),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself too deeply"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "calls itself too deeply"),
        ("{% break %}", "can't be parsed: 'break' outside loop"),
        ("{% for i in 'a' %}" * 30 + "{% endfor %}" * 30, "can't be parsed: too many statically"),
        ("{% macro f(a, a) %}{% endmacro %}", "can't be parsed: duplicate argument"),
        ("{{ 1 | nothing }}", "can't be parsed: No filter named"),
        ("{% include '/etc/passwd' %}", "refuses a conversation: no loader"),
        ("{{ raise_exception('a' * 10**6) }}", "refuses a conversation: a{300}$"),
        ("{{ strftime_now('%9999999999d') }}", ""),
    ],
)
def test_hostile_template(template: str, message: str):
    try:
        text = render(template, TALK)
    except UserError as error:
        text = str(error)
        assert text.startswith("the chat template")
        assert len(text) < 500
    assert re.search(message, text)
    assert "\n" not in text
    assert render(CHATML, TALK).startswith("<|im_start|>user")  # the next one is not concerned


def test_refusal_is_of_one_conversation_and_a_limit_of_the_template():
    with pytest.raises(Refusal):
        masked_parts("{{ 1 // 0 }}", TALK)
    for template in ("{{ 'a' * 10**10 }}", "{% set n = 10**10 %}{{ 'a' * n }}", "{% if %}"):
        with pytest.raises(UserError) as caught:
            masked_parts(template, TALK)
        assert not isinstance(caught.value, Refusal)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "Precompiled"),
        ({"model": {"type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]]}}, "UnkId"),
        ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": "("}}}, "not a valid"),
        ({"model": PARTS["model"] | {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]],
                                     "continuing_subword_prefix": "####"}}, "range end index"),
        ({"model": PARTS["model"] | {"vocab": {"a": 0, "b": 10**9}}}, "id is 1,000,000,000"),
        ({"model": PARTS["model"] | {"vocab": {"a": 0, "b": 10**9}},
          "pre_tokenizer": {"type": "Whitespace"}}, "id is 1,000,000,000"),
        ({"model": PARTS["model"] | {"vocab": {"a": 0, "b": 10**19}}}, "not a valid"),
        ({"model": PARTS["model"] | {"vocab": {"a": 0, "b": -1}}}, "not a valid"),
        ({"model": "BPE"}, "not a valid"),
        ({"normalizer": {"type": "Sequence", "normalizers": [1]}}, "not a valid"),
    ],
)  # fmt: skip
def test_tokenizer_that_cannot_be_loaded(tmp_path: Path, changed: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(written(tmp_path / "tokenizer.json", **changed))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))


def test_merge_to_a_token_that_is_missing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """The library panics; where it would do so in this process, pages appeared on the terminal."""
    model = PARTS["model"] | {"merges": [["a", "<|endoftext|>"]]}
    with pytest.raises(UserError, match="not a valid tokenizer"):
        load_tokenizer(written(tmp_path / "tokenizer.json", model=model))
    for merges in ("#version: 0.2\na <|endoftext|>", "a", "a  b", "\x00"):
        (tmp_path / "vocab.json").write_text(json.dumps(PARTS["model"]["vocab"]))
        (tmp_path / "merges.txt").write_text(merges)
        with pytest.raises(UserError, match=r"vocab\.json is not a valid tokenizer"):
            load_tokenizer(tmp_path / "vocab.json")
    assert capfd.readouterr().err == ""


def test_nested_tokenizer(tmp_path: Path):
    deep: dict[str, Any] = {"type": "Lowercase"}
    for _ in range(60):
        deep = {"type": "Sequence", "normalizers": [deep]}
    with pytest.raises(UserError, match="not a valid"):
        load_tokenizer(written(tmp_path / "tokenizer.json", normalizer=deep))


ENCODES = [
    ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(a+)+$"}}}, "retry-limit"),
    ({"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}},
     "retry-limit"),
    # Just below the library's own limit at every place of the text
    ({"pre_tokenizer": SPLIT | {"pattern": {"Regex": "(?:a{1,9}){7}(?=c)"}}}, TIME),
    ({"normalizer": {"type": "Sequence", "normalizers": [LONGER] * 6}}, MEMORY),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "message"), ENCODES)
def test_tokenizer_that_cannot_encode(tmp_path: Path, changed: dict[str, Any], message: str):
    file = written(tmp_path / "tokenizer.json", **changed)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(file).encode("a" * 5000 + "!")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(changed, marks=[pytest.mark.slow] if message == TIME else [])
        for changed, message in ENCODES
    ],
)
def test_corpus_that_cannot_be_encoded(
    tmp_path: Path, changed: dict[str, Any], capfd: pytest.CaptureFixture[str]
):
    """The processes that encode a corpus have the same limits, and print nothing."""
    (tmp_path / "text.txt").write_text("a" * 5000 + "!")
    with pytest.raises(UserError) as caught:
        tokenize(
            Source("files", (str(tmp_path / "text.txt"),)), tmp_path / "out", workers=1,
            tokenizer_path=written(tmp_path / "tokenizer.json", **changed),
        )  # fmt: skip
    died = r"fails on a text: .*retry-limit|takes more than"
    assert re.search(died, str(caught.value))
    assert "\n" not in str(caught.value)
    assert "panicked" not in capfd.readouterr().err


def test_tokenizer_that_cannot_decode(tmp_path: Path):
    grow = {"type": "Sequence", "decoders": [LONGER] * 6}
    tokenizer = load_tokenizer(written(tmp_path / "tokenizer.json", decoder=grow))
    with pytest.raises(UserError, match=EITHER):
        tokenizer.decode([0] * 100)


def test_post_processor_that_panics(tmp_path: Path):
    single = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "X", "type_id": 0}}]
    missing = {
        "type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {},
    }  # fmt: skip
    content = json.loads(train_bpe(iter(["a"]), 257).to_str())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"post_processor": missing}))
    tokenizer = load_tokenizer(tmp_path)
    assert len(tokenizer.encode("a", add_special_tokens=False).ids) == 1
    with pytest.raises(UserError, match="no entry found"):
        tokenizer.encode("a")


def test_confined_tokenizer_is_the_tokenizer(tmp_path: Path):
    """All that minigpt does with a tokenizer gives the same in the child as here."""
    text = "some text <|endoftext|> naïve 東京 123456 don't\n\n  " * 3
    trained = train_bpe(iter([text * 20]), 300)
    content = json.loads(trained.to_str())
    digits = {"type": "Digits", "individual_digits": True}
    parts = {"type": "Sequence", "pretokenizers": [digits, content["pre_tokenizer"]]}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(content | {"pre_tokenizer": parts}))
    theirs, ours = Tokenizer.from_file(str(file)), load_tokenizer(tmp_path)
    assert isinstance(ours, ConfinedTokenizer)
    assert not isinstance(load_tokenizer(save(trained, tmp_path / "plain.json")), ConfinedTokenizer)
    theirs.encode_special_tokens = True
    assert ours.encode(text).ids == theirs.encode(text).ids
    assert [each.ids for each in ours.encode_batch_fast([text, "", "b"])] == [
        each.ids for each in theirs.encode_batch_fast([text, "", "b"])
    ]
    theirs.encode_special_tokens = False
    ids = theirs.encode(text).ids
    assert recognising_special_tokens(ours).encode(text).ids == ids
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(
            ids, skip_special_tokens=skip
        )
    assert ours.to_str() == theirs.to_str()
    assert vocabulary_size(ours) == vocabulary_size(theirs)


def test_new_child_is_sent_the_tokenizer(tmp_path: Path):
    """A run keeps one for days; the child may be killed meanwhile, and a fork has its own."""
    tokenizer = load_tokenizer(written(tmp_path / "tokenizer.json", normalizer=LONGER))
    ids = tokenizer.encode("a").ids
    assert ids == [0] * 100
    os.kill(child._children[os.getpid()].pid, signal.SIGKILL)
    assert tokenizer.encode("a").ids == ids
    child._end(child._children[os.getpid()])
    assert tokenizer.decode(ids) == "a" * 100


def test_child_keeps_a_few_tokenizers(tmp_path: Path):
    files = [
        written(tmp_path / f"{n}.json", normalizer=LONGER | {"content": "a" * n})
        for n in range(1, 8)
    ]
    loaded = [load_tokenizer(file) for file in files]
    for _ in range(2):
        assert [len(tokenizer.encode("a").ids) for tokenizer in loaded] == list(range(1, 8))
    for file in files:  # what the child runs, here
        untrusted._load(file.name, file.read_text())
    assert list(untrusted._tokenizers) == [file.name for file in files[-4:]]
    untrusted._decode(files[-4].name, [0], True)  # the one used last goes last
    untrusted._load("new", files[0].read_text())
    assert list(untrusted._tokenizers) == [*(f.name for f in files[-3:]), files[-4].name, "new"][1:]
    untrusted._tokenizers.clear()


def test_copies_of_a_confined_tokenizer(tmp_path: Path):
    tokenizer = load_tokenizer(written(tmp_path / "tokenizer.json", normalizer=LONGER))
    for same in (
        copy.copy(tokenizer), copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))
    ):  # fmt: skip
        assert isinstance(same, ConfinedTokenizer)
        assert same.encode("a").ids == [0] * 100
        assert same.to_str() == tokenizer.to_str()
    with pytest.raises(AttributeError, match="nothing_like_that"):
        tokenizer.nothing_like_that  # type: ignore[attr-defined]  # noqa: B018


def test_truncation_and_padding_are_off(tmp_path: Path):
    """Also in the file that is written of a tokenizer: an export's, a dataset's."""
    file = written(
        tmp_path / "tokenizer.json", normalizer=LONGER,
        truncation={"direction": "Right", "max_length": 16, "strategy": "LongestFirst",
                    "stride": 0},
        padding={"strategy": {"Fixed": 200}, "direction": "Right", "pad_to_multiple_of": None,
                 "pad_id": 0, "pad_type_id": 0, "pad_token": "a"},
    )  # fmt: skip
    assert len(Tokenizer.from_file(str(file)).encode("a").ids) == 200
    tokenizer = load_tokenizer(file)
    assert len(tokenizer.encode("a").ids) == 100
    content = json.loads(tokenizer.to_str())
    assert (content["truncation"], content["padding"]) == (None, None)


def save(tokenizer: Tokenizer, file: Path) -> Path:
    tokenizer.save(str(file))
    return file


def test_a_hostile_template_ends_the_preparation(tmp_path: Path):
    """Not each record by itself, at ten seconds each."""
    from minigpt_cli.prepare.instructions import make_instructions

    tokenizer = save(train_bpe(iter(["some text"]), 260), tmp_path / "tokenizer.json")
    (tmp_path / "talk.jsonl").write_text(json_lines(*[{"messages": TALK}] * 50))
    with pytest.raises(UserError, match="takes more than"):
        make_instructions(
            Source("jsonl", (str(tmp_path / "talk.jsonl"),)), tmp_path / "out",
            tokenizer_path=tokenizer, chat_template="{% set n = 10**10 %}{{ 'a' * n }}",
            variables={}, val_fraction=0.1, warn=pytest.fail,
        )  # fmt: skip


def test_child_ends_with_its_parent_and_after_a_signal():
    render(CHATML, TALK)
    process = child._children[os.getpid()]
    os.kill(process.pid, signal.SIGKILL)
    assert render(CHATML, TALK)
    again = child._children[os.getpid()]
    assert again is not process
    assert again.stdin is not None
    again.stdin.close()
    assert again.wait(60) == 0
    del child._children[os.getpid()]


def test_memory_of_this_process_stays(tmp_path: Path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for template in ("{{ 'a' * 10**9 }}", "{% set n = 10**9 %}{{ 'a' * n }}"):
        with pytest.raises(UserError):
            render(template, TALK)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 100_000  # KB
