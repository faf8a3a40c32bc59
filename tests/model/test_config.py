"""A model's shape: what is left out is filled in, and all that is wrong is named at once."""

import dataclasses

import pytest

from minigpt_cli.core.errors import UserError
from minigpt_cli.model.config import model_config

GOOD = {
    "vocab_size": 100,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 32,
}


def build(family, **changes):
    return model_config(family=family, **{**GOOD, **changes})


def test_gpt2s_own_values_are_filled_in():
    config = build("gpt2")
    assert dataclasses.asdict(config) == GOOD | {
        "family": "gpt2",
        "num_key_value_heads": 6,
        "head_dim": 16,
        "intermediate_size": 384,
        "rope_theta": 10_000.0,
        "norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "mlp_bias": True,
        "initializer_range": 0.02,
        "dropout": 0.0,
        "rope_scaling": None,
    }


def test_what_other_families_fill_in():
    assert build("llama").intermediate_size == 256  # 8/3 of 96, exactly
    assert build("llama", hidden_size=108).intermediate_size == 320  # 288, rounded up to 64s
    assert build("llama").tie_word_embeddings is False
    assert build("qwen3").norm_eps == 1e-6
    assert build("qwen3", head_dim=32).head_dim == 32


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_given_values_stand(family, tied):
    config = build(family, tie_word_embeddings=tied, intermediate_size=70, norm_eps=1e-3)
    assert config.tie_word_embeddings is tied
    assert (config.intermediate_size, config.norm_eps) == (70, 1e-3)


@pytest.mark.parametrize(
    ("family", "changes", "problems"),
    [
        ("gpt2", {"hidden_size": 100}, ["hidden_size 100", "num_attention_heads 6"]),
        ("llama", {"num_key_value_heads": 4}, ["num_attention_heads 6", "num_key_value_heads 4"]),
        ("gpt2", {"num_key_value_heads": 2}, ["grouped-query"]),
        ("gpt2", {"head_dim": 8}, ["head_dim"]),
        ("qwen3", {"head_dim": 7}, ["head_dim", "7"]),
        ("llama", {"hidden_size": 90}, ["head_dim", "15"]),
        ("llama", {"dropout": 1.0}, ["dropout", "1.0"]),
        ("llama", {"vocab_size": 0, "num_hidden_layers": -1}, ["vocab_size", "num_hidden_layers"]),
        (
            "llama",
            {"hidden_size": 99, "num_key_value_heads": 4, "max_position_embeddings": 0,
             "intermediate_size": -3, "dropout": -0.1},
            ["hidden_size 99", "num_key_value_heads 4", "max_position_embeddings",
             "intermediate_size", "dropout"],
        ),
        ("llama", {"num_attention_heads": 0}, ["num_attention_heads"]),
        ("llama", {"num_attention_heads": -2}, ["num_attention_heads"]),
        ("llama", {"num_key_value_heads": 0, "head_dim": 0, "intermediate_size": 0},
         ["num_key_value_heads", "head_dim", "intermediate_size"]),
        ("qwen3", {"rope_theta": 0.0, "norm_eps": -1e-5, "initializer_range": float("nan")},
         ["rope_theta", "norm_eps", "initializer_range"]),
    ],
)  # fmt: skip
def test_bad_sizes_give_one_error_that_names_them_all(family, changes, problems):
    with pytest.raises(UserError) as error:
        build(family, **changes)
    message = str(error.value)
    assert message.startswith("[model] ")
    assert "\n" not in message
    for problem in problems:
        assert problem in message
