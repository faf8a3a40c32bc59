import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minigpt_cli.data.dataset import split_in_memory
from minigpt_cli.data.loader import Gathered, TokenSequences
from minigpt_cli.data.sequences import EvalData
from minigpt_cli.evaluate.loss import evaluate, fixed_sequences
from minigpt_cli.model.config import model_config
from minigpt_cli.model.gpt import GPT, initialize_weights

CONFIG = model_config(
    family="llama", vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=8, dropout=0.3,
)  # fmt: skip
LENGTHS = np.arange(50, dtype=np.int32) % 5


@pytest.fixture(scope="module")
def model() -> GPT:
    model = GPT(CONFIG).double()
    initialize_weights(model, 1)
    return model.train()


def batches_of(stream: np.ndarray, batch_size: int) -> Iterator[Gathered]:
    """Cut a text's tokens into sequences of 8."""
    sequences = TokenSequences(split_in_memory(stream, vocab_size=50, eos_id=0), 8)
    return EvalData(sequences, 1.0).batches(batch_size)


@given(available=st.integers(0, 1000), wanted=st.integers(1, 100))
def test_fixed_windows_are_spread_over_all(available: int, wanted: int):
    ids = fixed_sequences(available, wanted)
    assert len(ids) == min(available, wanted)
    assert len(set(ids.tolist())) == len(ids)
    if len(ids) > 1:
        gaps = np.diff(ids)
        assert gaps.max() - gaps.min() <= 1
        assert ids[0] == 0
        assert ids[-1] + gaps.max() + 1 >= available


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_loss_by_token_and_byte(model: GPT, batch: int):
    stream = np.random.default_rng(0).integers(0, 50, 30)  # 3 windows of 8, a tail of 5
    result = evaluate(
        model,
        batches_of(stream, batch),
        dtype=torch.float64,
        token_bytes=LENGTHS,
        bytes_per_token=99.0,
    )
    assert result is not None
    model.eval()
    losses = []
    for start in range(0, 29, 8):
        window = torch.from_numpy(stream[start : start + 9])
        logits = model(window[None, :-1])[0]
        losses += (-logits.log_softmax(-1)[range(len(window) - 1), window[1:]]).tolist()
    model.train()
    text_bytes = sum(int(LENGTHS[token]) for token in stream[1:])
    assert len(losses) == 29
    assert result.tokens == 29
    assert result.loss == pytest.approx(np.mean(losses), rel=1e-12)
    assert result.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-12)
    assert result.bits_per_byte == pytest.approx(sum(losses) / math.log(2) / text_bytes, rel=1e-12)


def test_evaluation_leaves_no_trace(model: GPT):
    stream = np.arange(40) % 50

    def run() -> float:
        result = evaluate(
            model,
            batches_of(stream, 2),
            dtype=torch.float64,
            token_bytes=None,
            bytes_per_token=2.5,
        )
        assert result is not None
        assert result.bytes == 39 * 2.5
        return result.loss

    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert run() == run()
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_it_can_be_given_up(model: GPT):
    asked = iter([False, True])
    zeros = np.zeros((1, 8), dtype=np.int64)
    batches = ((zeros, zeros, None) for _ in range(5))
    result = evaluate(
        model, batches, dtype=torch.float64, token_bytes=LENGTHS, bytes_per_token=1.0,
        stop=lambda: next(asked),
    )  # fmt: skip
    assert result is None
    assert model.training
