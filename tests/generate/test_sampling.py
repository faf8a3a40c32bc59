"""Logits to tokens, with transformers' logits processors as the oracle."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minigpt_cli.core.errors import UserError
from minigpt_cli.generate.sampling import (
    NOT_FINITE,
    SamplingOptions,
    draw_uniforms,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    next_tokens,
    penalize_repetition,
    process_logits,
)

ROWS, VOCAB = 5, 97


@pytest.fixture
def logits():
    return torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0)) * 3


@pytest.fixture
def history():
    """Tokens seen so far, as ids for transformers and as a mask for us."""
    ids = torch.randint(VOCAB, (ROWS, 40), generator=torch.Generator().manual_seed(1))
    return ids, torch.zeros(ROWS, VOCAB, dtype=torch.bool).scatter_(1, ids, True)


def test_filters_equal_those_of_transformers(logits, history):
    ids, seen = history
    pairs = [
        (RepetitionPenaltyLogitsProcessor(1.3), penalize_repetition(logits, seen, 1.3)),
        (RepetitionPenaltyLogitsProcessor(0.7), penalize_repetition(logits, seen, 0.7)),
        *((TopKLogitsWarper(k), keep_top_k(logits, k)) for k in (1, 2, 50, VOCAB, 10 * VOCAB)),
        *((TopPLogitsWarper(p), keep_top_p(logits, p)) for p in (1e-6, 0.1, 0.5, 0.9, 0.999)),
        *((MinPLogitsWarper(p), keep_min_p(logits, p)) for p in (0.0, 0.01, 0.3, 0.999)),
    ]
    for theirs, ours in pairs:
        torch.testing.assert_close(ours, theirs(ids, logits.clone()), rtol=0, atol=0)


def test_the_chain_equals_that_of_transformers(logits, history):
    ids, seen = history
    options = SamplingOptions(2.5, 20, 0.9, 0.1, 1.2)
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(options.repetition_penalty),
            TemperatureLogitsWarper(options.temperature),
            TopKLogitsWarper(options.top_k),
            TopPLogitsWarper(options.top_p),
            MinPLogitsWarper(options.min_p),
        ]
    )(ids, logits.clone())
    ours = process_logits(logits, options, seen)
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    # Ours are shifted by a constant: that is no difference between distributions.
    torch.testing.assert_close(ours.log_softmax(-1), theirs.log_softmax(-1))
    for off in (
        {"repetition_penalty": 1.0},
        {"temperature": 1.0},
        {"top_k": None},
        {"top_p": None},
        {"min_p": None},
    ):  # each has something to do here, or the comparison above proved nothing about it
        other = process_logits(logits, dataclasses.replace(options, **off), seen)
        assert not torch.equal(other.softmax(-1), ours.softmax(-1)), off


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 40))
def test_top_k_with_ties(values, k):
    kept = keep_top_k(torch.tensor([values], dtype=torch.float32), k)[0].isfinite()
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    assert kept.nonzero().flatten().tolist() == sorted(expected)


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=20),
    st.floats(0.01, 1.0, exclude_max=True),
)
def test_top_p_keeps_the_fewest_tokens_that_reach_p(values, p):
    row = torch.tensor([values], dtype=torch.float64)
    kept = keep_top_p(row, p)[0].isfinite()
    probs = row.softmax(-1)[0]
    assert probs[kept].sum() >= p - 1e-12
    assert probs[kept].sum() - probs[kept].min() < p + 1e-12
    if not kept.all():
        assert probs[kept].min() >= probs[~kept].max()


def test_greedy_with_penalty(logits, history):
    _, seen = history
    uniforms = torch.rand(ROWS, dtype=torch.float64)
    greedy = SamplingOptions(temperature=0, top_k=3)
    assert torch.equal(next_tokens(logits, greedy, uniforms), logits.argmax(-1))
    penalized = next_tokens(logits, SamplingOptions(0, repetition_penalty=100.0), uniforms, seen)
    assert not seen.gather(1, penalized[:, None]).any()


def test_frequencies_match_the_probabilities():
    probs = torch.tensor([0.5, 0.2, 0.0, 0.15, 0.1, 0.05])
    n = 200_000
    uniforms = draw_uniforms(3, 1, n)[0]
    tokens = next_tokens(probs.log().expand(n, -1), SamplingOptions(temperature=1.0), uniforms)
    counts = torch.bincount(tokens, minlength=len(probs)).double()
    assert counts[2] == 0
    # A multinomial count deviates by more than 5 sigma once in a million times.
    sigma = (n * probs * (1 - probs)).sqrt()
    assert ((counts - n * probs).abs() <= 5 * sigma).all()


@given(st.sampled_from([0.0, 0.5, 1 - 2**-53, 1.0]), st.integers(0, 100))  # 1 is float32's
def test_filtered_tokens_are_never_drawn(uniform, seed):
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(seed))
    options = SamplingOptions(temperature=1.0, top_k=3)
    token = next_tokens(logits, options, torch.tensor([uniform], dtype=torch.float64))
    assert token.item() in logits[0].topk(3).indices.tolist()


def test_tiny_temperatures_do_not_overflow(logits):
    uniforms = torch.full((ROWS,), 0.5, dtype=torch.float64)
    tokens = next_tokens(logits, SamplingOptions(temperature=1e-40), uniforms)
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rows_that_are_not_finite_are_marked(logits, temperature, bad):
    logits[2, 7] = bad
    uniforms = torch.full((ROWS,), 0.5, dtype=torch.float64)
    tokens = next_tokens(logits, SamplingOptions(temperature), uniforms)
    assert (tokens == NOT_FINITE).tolist() == [False, False, True, False, False]


def test_uniforms_by_seed_and_row():
    few, many = draw_uniforms(5, 2, 10), draw_uniforms(5, 4, 30)
    assert torch.equal(few, many[:2, :10])
    assert len(many.flatten().unique()) == 120
    assert not torch.equal(few, draw_uniforms(6, 2, 10))


def test_drawing_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    next_tokens(torch.zeros(2, 9), SamplingOptions(), draw_uniforms(0, 2, 1)[:, 0])
    assert torch.equal(before, torch.get_rng_state())


def test_options_out_of_range():
    with pytest.raises(UserError) as error:
        SamplingOptions(temperature=-1, top_k=0, top_p=0.0, min_p=1.0, repetition_penalty=0.0)
    message = str(error.value)
    assert "\n" not in message
    for name in ("--temperature", "--top-k", "--top-p", "--min-p", "--repetition-penalty"):
        assert name in message


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"min_p": -0.1},
        {"repetition_penalty": -2.0},
        {"repetition_penalty": math.nan},
    ],
)
def test_each_bad_option_is_refused(values):
    with pytest.raises(UserError, match=next(iter(values)).replace("_", "-")):
        SamplingOptions(**values)


def test_the_ends_of_the_ranges_are_allowed():
    SamplingOptions(temperature=0, top_k=1, top_p=1.0, min_p=0.0, repetition_penalty=0.1)
