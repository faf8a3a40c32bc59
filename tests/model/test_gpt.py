"""The transformer: its size, its initial weights, what sees what, and what changes nothing."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minigpt_cli.core.errors import UserError
from minigpt_cli.model.config import model_config
from minigpt_cli.model.cost import parameter_count
from minigpt_cli.model.gpt import GPT, initialize_weights
from minigpt_cli.model.kv_cache import new_cache
from tests.helpers.ops import CountOps

FAMILIES = ["gpt2", "llama", "qwen3"]
GPT2_124M = {
    "family": "gpt2",
    "vocab_size": 50257,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 1024,
}


def small_config(family, **changes):
    settings = {
        "vocab_size": 67,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": None if family == "gpt2" else 2,
        "max_position_embeddings": 16,
        **changes,
    }
    return model_config(family=family, **settings)


def small_model(family, seed=0, **changes):
    model = GPT(small_config(family, **changes))
    initialize_weights(model, seed)
    return model


def tokens(rows=2, length=16, seed=0):
    ids = torch.randint(67, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:].clone()


def real_count(config):
    with torch.device("meta"):
        return sum(p.numel() for p in GPT(config).parameters())


# Size


def test_gpt2_has_exactly_its_parameters():
    config = model_config(**GPT2_124M)
    assert parameter_count(config) == 124_439_808
    assert real_count(config) == 124_439_808


def test_untying_adds_exactly_one_embedding():
    tied = parameter_count(model_config(**GPT2_124M))
    untied = parameter_count(model_config(**GPT2_124M, tie_word_embeddings=False))
    assert untied - tied == 50257 * 768


@settings(max_examples=100, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    vocab_size=st.integers(1, 99),
    head_dim=st.integers(1, 9).map(lambda half: 2 * half),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    hidden_size=st.integers(1, 50),
    intermediate_size=st.integers(1, 70) | st.none(),
    num_hidden_layers=st.integers(1, 3),
    max_position_embeddings=st.integers(1, 40),
    tied=st.booleans() | st.none(),
)
def test_parameter_count_is_the_real_count(family, head_dim, heads, hidden_size, tied, **sizes):
    gpt2 = family == "gpt2"
    config = model_config(
        family=family,
        head_dim=head_dim,
        hidden_size=head_dim * heads[0] if gpt2 else hidden_size,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[0] if gpt2 else heads[1],
        tie_word_embeddings=tied,
        **sizes,
    )
    assert parameter_count(config) == real_count(config)


# Initial weights


@pytest.mark.parametrize("family", FAMILIES)
def test_initial_weights_have_the_papers_spread(family):
    layers, std = 8, 0.05
    model = small_model(
        family, num_hidden_layers=layers, initializer_range=std, hidden_size=128, vocab_size=500
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = std / math.sqrt(2 * layers) if residual else std
            # The std of n samples deviates by std / sqrt(2n); 5 of those is one in a million.
            tolerance = 5 * expected / math.sqrt(2 * parameter.numel())
            assert abs(parameter.std().item() - expected) < tolerance, name
            assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name


def test_initial_weights_by_seed_and_name():
    wide = dict(small_model("llama", num_hidden_layers=2).named_parameters())
    other = dict(small_model("llama", seed=1, num_hidden_layers=2).named_parameters())
    qwen3 = dict(small_model("qwen3", num_hidden_layers=2).named_parameters())
    torch.manual_seed(123)  # the global generator has no say
    again = dict(small_model("llama", num_hidden_layers=2).named_parameters())
    matrices = [name for name in wide if "norm" not in name]
    for name in matrices:
        assert torch.equal(wide[name], again[name])
        assert torch.equal(wide[name], qwen3[name])  # another model around it, in another order
        assert not torch.equal(wide[name], other[name])
    first, second = (f"layers.{i}.self_attn.q_proj.weight" for i in (0, 1))
    assert not torch.equal(wide[first], wide[second])


def test_initializing_keeps_global_generator():
    model = GPT(small_config("gpt2"))
    before = torch.get_rng_state()
    initialize_weights(model, 0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_initial_loss_is_that_of_guessing(family):
    model = small_model(family, vocab_size=256, hidden_size=64)
    inputs, targets = tokens(rows=8)
    with torch.no_grad():
        loss = model(inputs, targets) / targets.numel()
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)  # 5.55


def test_a_tied_head_is_the_embedding_itself():
    model = small_model("gpt2")
    assert model.head_weight() is model.embed_tokens.weight
    assert not any("lm_head" in name for name in model.state_dict())
    untied = small_model("gpt2", tie_word_embeddings=False)
    assert untied.head_weight() is untied.lm_head.weight


# What sees what


@pytest.mark.parametrize("family", FAMILIES)
def test_no_position_sees_what_comes_after_it(family):
    model = small_model(family, initializer_range=0.3).double()
    ids, _ = tokens(rows=1)
    with torch.no_grad():
        before = model(ids)
        for changed in (1, 7, 15):
            other = ids.clone()
            other[0, changed] = (ids[0, changed] + 1) % 67
            after = model(other)
            torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=1e-12)
            assert ((after - before)[0, changed:].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_position_matters(family):
    """The same two tokens swapped, seen from the same third one."""
    model = small_model(family, initializer_range=0.3).double()
    with torch.no_grad():
        one, two = model(torch.tensor([[5, 9, 3], [9, 5, 3]]), logits_to_keep=1)
    assert (one - two).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pieces", [[16], [1] * 16, [5, 11], [7, 1, 1, 4, 3]])
def test_pieces_with_a_cache_give_what_the_whole_gives(family, pieces):
    model = small_model(family, initializer_range=0.3).double().eval()
    ids, _ = tokens(rows=3)
    cache = new_cache(model.config, 3, 16, torch.device("cpu"), torch.float64)
    cache.keys.fill_(torch.nan)  # what isn't written yet is never read
    cache.values.fill_(torch.nan)
    with torch.no_grad():
        whole = model(ids)
        parts = [model(part, cache=cache) for part in ids.split(pieces, dim=1)]
    assert cache.length == cache.capacity == 16
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-11)


def test_logits_to_keep_gives_the_last_logits():
    model = small_model("llama")
    ids, _ = tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(ids, logits_to_keep=1), model(ids)[:, -1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_beyond_the_context_are_refused(family):
    model = small_model(family)
    with pytest.raises(AssertionError, match="17 positions in a model of 16"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    cache = new_cache(model.config, 1, 16, torch.device("cpu"), torch.float32)
    model(torch.zeros(1, 16, dtype=torch.int64), cache=cache)
    with pytest.raises(AssertionError, match="17 positions"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache=cache)


# The loss


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_sums_valid_targets(family):
    model = small_model(family, initializer_range=0.3).double()
    ids, targets = tokens()
    targets[0, 3:9] = -100
    log_probs = model(ids).log_softmax(-1)
    rows, columns = (targets != -100).nonzero(as_tuple=True)
    expected = -log_probs[rows, columns, targets[rows, columns]].sum()
    loss = model(ids, targets)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)


def test_halves_of_a_batch_add_up_to_the_whole():
    model = small_model("llama").double()
    ids, targets = tokens(rows=4)
    whole = model(ids, targets)
    halves = model(ids[:2], targets[:2]) + model(ids[2:], targets[2:])
    torch.testing.assert_close(halves, whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_in_the_models_precision(dtype):
    model = small_model("qwen3").to(dtype)
    assert model(*tokens()).dtype == dtype


@pytest.mark.filterwarnings("error")  # a user would see them at every run
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_autocast(family):
    model = small_model(family, initializer_range=0.1)
    exact = gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, rounded = gradients(model)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact[0].item(), rel=1e-2)
    for name, gradient in exact[1].items():
        assert rounded[name].dtype == torch.float32
        assert (rounded[name] - gradient).norm() < 0.1 * gradient.norm() + 1e-3, name


# Dropout and activation checkpointing


def gradients(model):
    model.zero_grad()
    loss = model(*tokens())
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_dropout_acts_in_training_alone():
    model = small_model("gpt2", dropout=0.3)
    plain = small_model("gpt2")
    ids, _ = tokens()
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))
    assert torch.equal(model(ids), plain(ids))


@pytest.mark.parametrize("recompute", [True, "selective"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_activations_changes_no_bit(family, dropout, recompute, monkeypatch):
    model = small_model(family, dropout=dropout)
    torch.manual_seed(5)
    with CountOps() as first:
        loss, expected = gradients(model)
    calls = []
    model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: calls.append(None))
    model.checkpoint_activations = recompute
    torch.manual_seed(5)
    kept_states = []
    read = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: kept_states.append(None) or read())
    with CountOps() as second:
        again, recomputed = gradients(model)
    assert len(calls) == 2  # once on the way there, once more on the way back
    assert bool(kept_states) == bool(dropout)
    again_in_block = {"gpt2": 4, "llama": 7, "qwen3": 7}[family]
    if not dropout:
        again_in_block -= 1  # nothing needs the block's last product
    assert second.products - first.products == (
        0 if recompute == "selective" else 2 * again_in_block
    )
    assert torch.equal(loss, again)
    assert all(torch.equal(recomputed[name], expected[name]) for name in expected)


def test_sizes_that_do_not_fit_are_the_users_error():
    with pytest.raises(UserError, match="multiple"):
        small_config("llama", num_attention_heads=5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("recompute", [False, True, "selective"])
def test_examples_in_one_row_are_as_if_alone(family: str, recompute: bool | str):
    """Losses and gradients, against each example in a row of its own."""
    config = model_config(
        family=family, vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4 if family == "gpt2" else 2, max_position_embeddings=24,
    )  # fmt: skip
    packed, alone = GPT(config).double().train(), GPT(config).double().train()
    initialize_weights(packed, 1)
    alone.load_state_dict(packed.state_dict())
    packed.checkpoint_activations = recompute
    lengths = ((3, 11, 1, 5), (20,))  # and padding
    inputs = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(0))
    targets = torch.randint(0, 50, (2, 24), generator=torch.Generator().manual_seed(1))
    segment_ids = torch.zeros_like(inputs)
    expected = torch.zeros((), dtype=torch.float64)
    for row, each in enumerate(lengths):
        at = 0
        for number, length in enumerate(each):
            part = slice(at, at + length)
            segment_ids[row, part] = number
            expected = expected + alone(inputs[None, row, part], targets[None, row, part])
            at += length
        segment_ids[row, at:], targets[row, at:] = len(each), -100
    loss = packed(inputs, targets, segment_ids)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=name)
