"""Log-likelihoods of continuations against a plain loop, one pair at a time."""

import pytest
import torch

from minigpt_cli.core.errors import Diverged, UserError
from minigpt_cli.evaluate.continuations import score_continuations
from minigpt_cli.model.config import model_config
from minigpt_cli.model.gpt import GPT, initialize_weights

PAIRS = [
    ([1, 2, 3], [4]),
    ([1, 2, 3], [5]),  # the same forward pass
    ([1, 2], [3, 6]),  # and this one
    ([7], [8, 9, 10, 11]),
    (list(range(30)), [3, 4]),  # the beginning is cut
    (list(range(15)), [15, 16]),  # fits: the last token is never read
    ([5], list(range(16))),
]


def small_model(family: str) -> GPT:
    config = model_config(
        family=family, vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, initializer_range=0.4,
    )  # fmt: skip
    model = GPT(config)
    initialize_weights(model, 0)
    return model.eval()


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_scores(family: str, batch_size: int):
    model = small_model(family)
    found = score_continuations(model, PAIRS, dtype=torch.float32, batch_size=batch_size)
    for (context, continuation), score in zip(PAIRS, found, strict=True):
        tokens = [*context, *continuation][-17:]
        with torch.no_grad():
            log_probs = model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
        log_probs = log_probs[-len(continuation) :]
        expected = sum(log_probs[i, token].item() for i, token in enumerate(continuation))
        assert score.log_likelihood == pytest.approx(expected, abs=1e-4)
        assert score.is_greedy == (log_probs.argmax(-1).tolist() == continuation)
    greedy = log_probs[-1].argmax().item()
    (best,) = score_continuations(
        model, [([5, *range(15)], [greedy])], dtype=torch.float32, batch_size=1
    )
    assert best.is_greedy


def test_batches_are_tracked_and_share_forward_passes():
    seen = []

    def track(batches, what):
        seen.append((what, [len(batch) for batch in batches]))
        return batches

    score_continuations(small_model("gpt2"), PAIRS, dtype=torch.float32, batch_size=2, track=track)
    assert seen == [("scoring", [2, 2, 1])]  # 5 rows answer 7 requests
    assert score_continuations(small_model("gpt2"), [], dtype=torch.float32, batch_size=2) == []


def test_refusals():
    model = small_model("llama")
    with pytest.raises(UserError, match="a continuation has 17 tokens, more than the model's"):
        score_continuations(model, [([1], [1] * 17)], dtype=torch.float32, batch_size=1)
    model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(Diverged, match="not finite"):
        score_continuations(model, PAIRS, dtype=torch.float32, batch_size=1)
