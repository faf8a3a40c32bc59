"""Tokens to text: whole characters, stop strings, and pieces that add up to the completion."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from minigpt_cli.core.errors import UserError
from minigpt_cli.data.tokenizer import EOS, eos_id, vocabulary_size
from minigpt_cli.generate.engine import generate
from minigpt_cli.generate.sampling import SamplingOptions
from minigpt_cli.generate.text import detokenizer, join_chunks, split_at_stop, stream_text
from minigpt_cli.model.config import model_config
from minigpt_cli.model.gpt import GPT, initialize_weights
from minigpt_cli.prepare.bpe import train_bpe

# Merges for English and none for the rest: an emoji is four tokens, a family of them eighteen.
TOKENIZER = train_bpe(iter(["the cat sat on the mat, the end. " * 20]), 280)
EOS_ID = eos_id(TOKENIZER)
FREE = SamplingOptions(temperature=1.0)


@pytest.fixture(scope="module")
def model():
    config = model_config(
        family="gpt2",
        vocab_size=300,  # more than the tokenizer has, as where embeddings are padded
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = GPT(config)
    initialize_weights(model, 0)
    return model.double()


def teach(text):
    """A model that has one text by heart: its head gives each position's next token, and then EOS.

    No training: positions are one-hot, the layer adds nothing, the head maps position to token.
    """
    ids = [*TOKENIZER.encode(text, add_special_tokens=False).ids, EOS_ID]
    size = len(ids)
    config = model_config(
        family="gpt2",
        vocab_size=vocabulary_size(TOKENIZER),
        hidden_size=size,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=size,
        tie_word_embeddings=False,
    )
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed_positions.weight.copy_(torch.eye(size))
        model.norm.weight.fill_(1.0)
        model.lm_head.weight[ids, torch.arange(size)] = 100.0
    return model, ids


def stream(model, **options):
    return list(
        stream_text(
            model, TOKENIZER, [EOS_ID], SamplingOptions(0), max_new_tokens=1000, eos_id=EOS_ID,
            **options,
        )
    )  # fmt: skip


def pushed(tokenizer, ids, prompt=()):
    decoder = detokenizer(tokenizer, prompt)
    return [*(decoder.push(token) for token in ids), decoder.flush()]


TEXTS = st.text(
    st.one_of(st.sampled_from("the cat, sat.\n"), st.characters(exclude_categories=["Cs"])),
    max_size=60,
)


@given(TEXTS, TEXTS)
def test_text_is_whole(prompt, text):
    encode = lambda t: TOKENIZER.encode(t, add_special_tokens=False).ids  # noqa: E731
    pieces = pushed(TOKENIZER, encode(text), encode(prompt))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
        assert pieces[-1] == ""  # nothing had to wait for the end


@given(st.lists(st.integers(0, vocabulary_size(TOKENIZER) - 1), max_size=120))
def test_streaming_equals_decoding_at_once(ids):
    pieces = pushed(TOKENIZER, ids)
    assert "".join(pieces) == TOKENIZER.decode(ids)


@given(st.binary(max_size=40).map(lambda noise: noise.decode("utf-8", "replace")))
def test_little_is_held_back(text):
    """However long the text, only a character's three bytes wait."""
    decoder = detokenizer(TOKENIZER, [])
    shown = ""
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    for n, token in enumerate(ids, start=1):
        shown += decoder.push(token)
        whole = TOKENIZER.decode(ids[:n])
        assert whole.rstrip("\ufffd").startswith(shown.rstrip("\ufffd"))
        assert len(whole) - len(shown) <= 3
    assert len(decoder.window) <= 33


def test_special_tokens_are_no_text():
    a = TOKENIZER.encode("a", add_special_tokens=False).ids
    assert pushed(TOKENIZER, [EOS_ID, *a, EOS_ID, *a]) == ["", "a", "", "a", ""]
    emoji = TOKENIZER.encode("😀", add_special_tokens=False).ids
    assert "".join(pushed(TOKENIZER, [*emoji[:2], *[EOS_ID] * 50, *emoji[2:]])) == "😀"


def test_unusual_decoders():
    """As in Llama 2's tokenizer: the first token's space goes, bytes stand for rare characters."""
    vocab = {"▁the": 0, "▁cat": 1, "s": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    emoji = [3 + byte for byte in "😀".encode()]
    assert pushed(tokenizer, [0, 1, 2]) == ["the", " cat", "s", ""]
    assert pushed(tokenizer, [1, 2, *emoji], prompt=[0]) == [" cat", "s", "", "", "", "😀", ""]
    assert "".join(pushed(tokenizer, [0, *emoji[:3]])) == "the\ufffd\ufffd\ufffd"


ABC = st.text("abc", max_size=12)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@given(st.lists(ABC, max_size=8), STOPS)
def test_stop_strings_across_pieces(pieces, stop):
    shown, held, stopped = "", "", False
    for piece in pieces:
        new, held, stopped = split_at_stop(held + piece, stop)
        shown += new
        if stopped:
            break
        so_far = shown + held
        assert not any(s in so_far for s in stop)
        # As little as possible is held back: a stop string begins there, and not before.
        assert not held or any(s.startswith(held) for s in stop)
        for n in range(len(held) + 1, len(so_far) + 1):
            assert not any(s.startswith(so_far[-n:]) for s in stop)
    text = "".join(pieces)
    ends = [(end, text[:end]) for end in range(len(text) + 1)]
    first = next(((end, t) for end, t in ends if any(t.endswith(s) for s in stop)), None)
    assert stopped == (first is not None)
    if first is None:
        assert shown + held == text
    else:
        longest = max(len(s) for s in stop if first[1].endswith(s))
        assert shown == text[: first[0] - longest]


@settings(max_examples=25)
@given(st.text("the cat,😀é", min_size=1, max_size=30), st.data())
def test_a_learned_text_streams_up_to_its_stop_string(text, data):
    model, _ = teach(text)
    start = data.draw(st.integers(0, len(text) - 1))
    stop = text[start : data.draw(st.integers(start + 1, len(text)))]
    pieces = stream(model, stop=[stop])
    assert "".join(piece.text for piece in pieces) == text[: text.index(stop)]
    assert [piece.finish_reason for piece in pieces][-1] == "stop"
    assert all(piece.finish_reason is None for piece in pieces[:-1])
    assert not any("\ufffd" in piece.text for piece in pieces)


def test_learned_text_streams_to_eos():
    text = "the end 👩‍👩‍👧 of naïve cats"
    model, _ = teach(text)
    pieces = stream(model)
    assert join_chunks(pieces) == join_chunks(stream(model, use_cache=False))
    assert join_chunks(pieces)[0].text == text
    assert join_chunks(pieces)[0].finish_reason == "eos"
    assert [piece.text for piece in pieces[:5]] == ["the", " end", " ", "👩", "\u200d"]
    held = stream(model, stop=["cats and dogs"])
    assert join_chunks(held)[0].text == text  # what was held back comes out at the end


def test_invalid_bytes_at_the_end_are_shown_as_such():
    emoji = TOKENIZER.encode("😀", add_special_tokens=False).ids
    assert len(emoji) == 4
    assert pushed(TOKENIZER, emoji[:2]) == ["", "", "\ufffd"]


@pytest.mark.parametrize("stop", [(), ("a",), ("th", "e ", "\ufffd")])
def test_samples_equal_the_tokens_of_generate(model, stop):
    settings = {"max_new_tokens": 50, "num_samples": 6, "seed": 3, "eos_id": EOS_ID}
    prompt = TOKENIZER.encode("the cat", add_special_tokens=False).ids
    pieces = list(stream_text(model, TOKENIZER, prompt, FREE, stop=stop, **settings))
    steps = list(generate(model, prompt, FREE, vocab_size=vocabulary_size(TOKENIZER), **settings))
    for sample, completion in enumerate(join_chunks(pieces)):
        text = TOKENIZER.decode([step[sample] for step in steps if step[sample] is not None])
        ended = any(step[sample] == EOS_ID for step in steps)
        if not any(s in text for s in stop):
            assert completion.text == text
            assert completion.finish_reason == ("eos" if ended else "length")
        else:
            assert text.startswith(completion.text)
            assert any(text.startswith(completion.text + s) for s in stop)
            assert completion.finish_reason == "stop"
    assert join_chunks(pieces) != join_chunks(
        stream_text(model, TOKENIZER, prompt, FREE, stop=stop, **settings | {"seed": 4})
    )


def test_an_empty_stop_string_is_refused(model):
    with pytest.raises(UserError, match="stop string"):
        stream_text(model, TOKENIZER, [1], FREE, max_new_tokens=1, stop=[""])


def test_the_end_of_text_is_not_written(model):
    assert EOS not in "".join(
        piece.text
        for piece in stream_text(
            model, TOKENIZER, [], FREE, max_new_tokens=300, num_samples=4, eos_id=EOS_ID
        )
    )
