"""Our models against transformers' own: the same weights, the same logits and gradients."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minigpt_cli.core.errors import UserError
from minigpt_cli.model.config import model_config
from minigpt_cli.model.gpt import GPT, initialize_weights
from minigpt_cli.model.hf_names import (
    config_from_huggingface,
    huggingface_config,
    huggingface_name,
    is_transposed,
)
from minigpt_cli.model.rotary import rope_table
from minigpt_cli.recipe import RopeScaling
from tests.helpers.hf_layout import from_huggingface, to_huggingface

BASE = {
    "vocab_size": 83,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "initializer_range": 0.2,
}
SHAPES = {
    "gpt2": {"family": "gpt2"},
    "gpt2 untied, narrow, other eps": {
        "family": "gpt2",
        "tie_word_embeddings": False,
        "intermediate_size": 80,
        "norm_eps": 1e-2,
    },
    "llama": {"family": "llama"},
    "llama tied, grouped, other theta": {
        "family": "llama",
        "tie_word_embeddings": True,
        "num_key_value_heads": 2,
        "rope_theta": 500.0,
        "norm_eps": 1e-2,
    },
    "llama multi-query, wide heads": {
        "family": "llama",
        "num_key_value_heads": 1,
        "head_dim": 20,
        "intermediate_size": 72,
    },
    "llama longer than a block of attention": {
        "family": "llama",
        "num_key_value_heads": 2,
        "max_position_embeddings": 300,
        "num_hidden_layers": 1,
    },
    "llama with biases, angles of llama 3": {
        "family": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "num_key_value_heads": 2,
        "rope_scaling": RopeScaling("llama3", 4.0, 1.0, 4.0, 12),
    },
    "llama with linear scaling, tied": {
        "family": "llama",
        "tie_word_embeddings": True,
        "rope_scaling": RopeScaling("linear", 2.5),
    },
    "qwen3 with biases": {"family": "qwen3", "attention_bias": True},
    "qwen3 wide heads, grouped": {
        "family": "qwen3",
        "head_dim": 32,
        "num_key_value_heads": 2,
        "rope_theta": 1e6,
    },
    "qwen3 tied, narrow heads": {
        "family": "qwen3",
        "head_dim": 6,
        "tie_word_embeddings": True,
        "norm_eps": 1e-2,
    },
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES.keys())
def config(request):
    return model_config(**{**BASE, **request.param})


def transformers_model(config, seed=0):
    """Random, norms and biases too: ones and zeros would hide a mistake."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**huggingface_config(config)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model.float().eval()


def ours_from(config, theirs):
    model = GPT(config)
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict(from_huggingface(config, names, theirs.state_dict()))
    return model


def batch(config):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(
        config.vocab_size, (2, config.max_position_embeddings + 1), generator=generator
    )
    return ids[:, :-1], ids[:, 1:]  # as long as the context


def test_logits_and_gradients_are_transformers(config):
    theirs = transformers_model(config)
    ours = ours_from(config, theirs)
    inputs, targets = batch(config)
    n = targets.numel()

    their_logits = theirs(inputs).logits
    torch.testing.assert_close(ours(inputs), their_logits, rtol=1e-4, atol=1e-4)
    assert their_logits.std() > 0.5  # so that 1e-4 means something

    their_loss = F.cross_entropy(their_logits.flatten(0, 1), targets.flatten())
    our_loss = ours(inputs, targets) / n
    torch.testing.assert_close(our_loss, their_loss, rtol=1e-5, atol=1e-5)
    their_loss.backward()
    our_loss.backward()
    gradients = to_huggingface(config, {k: p.grad for k, p in ours.named_parameters()})
    expected = {k: p.grad for k, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )
        assert (gradient.abs().max() > 1e-4) or name.endswith("k_proj.bias"), name


def test_names_and_shapes_are_all_of_transformers(config):
    theirs = dict(transformers_model(config).named_parameters())
    with torch.device("meta"):
        ours = GPT(config)
    weights = to_huggingface(config, dict(ours.named_parameters()))
    assert {name: w.shape for name, w in weights.items()} == {
        name: w.shape for name, w in theirs.items()
    }
    for name, parameter in ours.named_parameters():
        theirs_shape = theirs[huggingface_name(config, name)].shape
        assert (theirs_shape[::-1] if is_transposed(config, name) else theirs_shape) == (
            parameter.shape
        )


def test_the_round_trip_is_bit_equal(config):
    model = GPT(config)
    initialize_weights(model, 3)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    there = to_huggingface(config, weights)
    assert all(tensor.is_contiguous() for tensor in there.values())  # as safetensors wants them
    back = from_huggingface(config, list(weights), there)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_what_is_saved_loads_with_from_pretrained(config, tmp_path):
    """Only our files, no help from transformers' writer."""
    from safetensors.torch import save_file

    model = GPT(config)
    initialize_weights(model, 3)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    save_file(to_huggingface(config, weights), tmp_path / "model.safetensors", {"format": "pt"})
    settings = huggingface_config(config, {"eos_token_id": 7, "bos_token_id": 7})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    inputs, _ = batch(config)
    with torch.no_grad():
        torch.testing.assert_close(
            theirs.eval()(inputs).logits, model(inputs), rtol=1e-4, atol=1e-4
        )
    assert theirs.config.eos_token_id == theirs.config.bos_token_id == 7
    assert type(theirs).__name__ == huggingface_config(config)["architectures"][0]
    assert theirs.config.get_text_config().max_position_embeddings == config.max_position_embeddings


def test_config_has_dropout_and_initial_std():
    for family in ("gpt2", "llama", "qwen3"):
        config = model_config(family=family, dropout=0.25, **BASE)
        theirs = AutoConfig.for_model(**huggingface_config(config))
        assert theirs.initializer_range == 0.2
        names = ("attn_pdrop", "embd_pdrop", "resid_pdrop") if family == "gpt2" else (
            "attention_dropout",
        )  # fmt: skip
        assert [getattr(theirs, name) for name in names] == [0.25] * len(names)


def test_the_configuration_reads_back(config, tmp_path):
    """Ours, and what transformers writes of it: only what differs from its own defaults."""
    config = dataclasses.replace(config, dropout=0.0)
    assert config_from_huggingface(huggingface_config(config), "config.json") == config
    AutoConfig.for_model(**huggingface_config(config)).save_pretrained(tmp_path)
    theirs = json.loads((tmp_path / "config.json").read_text())
    assert config_from_huggingface(theirs, "config.json") == config


def test_defaults_of_transformers(tmp_path):
    for family in ("gpt2", "llama", "qwen3"):
        theirs = AutoConfig.for_model(family)
        config = config_from_huggingface({"model_type": family}, "config.json")
        again = AutoConfig.for_model(**huggingface_config(config))
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                     "max_position_embeddings", "tie_word_embeddings"):  # fmt: skip
            assert getattr(again, name) == getattr(theirs, name), (family, name)
        if family == "gpt2":
            assert config.intermediate_size == 4 * theirs.n_embd
            assert config.norm_eps == theirs.layer_norm_epsilon
        else:
            for name in ("head_dim", "num_key_value_heads", "intermediate_size", "rms_norm_eps"):
                assert getattr(again, name) == getattr(theirs, name), (family, name)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "mistral"}, "model_type mistral is not supported"),
        ({}, "model_type None is not supported"),
        (
            {"model_type": "gpt2", "activation_function": "relu", "scale_attn_weights": False},
            "not support gpt2 with activation_function 'relu'; scale_attn_weights False",
        ),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "not support llama with rope_parameters {'rope_type': 'yarn'",
        ),
        ({"model_type": "llama", "rope_scaling": {"type": "llama3", "factor": 8.0}},
         "rope_scaling of rope_type llama3 needs low_freq_factor"),
        ({"model_type": "llama", "rope_scaling": {"rope_type": "linear"}},
         "rope_scaling of rope_type linear needs factor"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window True"),
        ({"model_type": "llama", "hidden_size": "wide"}, "not the configuration of a model"),
        ({"model_type": "gpt2", "layer_norm_epsilon": -1},
         "norm_eps: expected a number above 0, got -1"),
        ({"model_type": "llama", "num_attention_heads": 0},
             "num_attention_heads: expected an integer above 0 and at most 1,000,000, got 0"),
        ({"model_type": "llama", "hidden_size": 64.0}, "not the configuration of a model"),
        ({"model_type": "llama", "rope_scaling": "x"}, "not the configuration of a model"),
        ({"model_type": "llama", "rope_theta": "abc"}, "not the configuration of a model"),
        ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
    ],
)  # fmt: skip
def test_what_is_not_computed_is_refused(settings, message):
    with pytest.raises(UserError) as error:
        config_from_huggingface(settings, "x/config.json")
    assert str(error.value).startswith("x/config.json: ")
    assert message in str(error.value)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_theta_is_written_for_old_and_new_readers(family):
    """transformers 4 reads ``rope_theta``, 5 ``rope_parameters``; other tools know only one."""
    settings = huggingface_config(model_config(family=family, rope_theta=500.0, **BASE))
    assert settings["rope_theta"] == 500.0
    assert settings["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(
    "scaling",
    [None, RopeScaling("linear", 4.0), RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)],
    ids=["default", "linear", "llama3"],
)
def test_angles_are_transformers_to_the_bit(scaling):
    """Llama 3.1's, up to its last position, where a frequency's rounding would show."""
    config = model_config(
        **{**BASE, "hidden_size": 512, "max_position_embeddings": 131_072}, family="llama",
        rope_theta=5e5, rope_scaling=scaling,
    )  # fmt: skip
    settings = AutoConfig.for_model(**huggingface_config(config))
    positions = torch.cat([torch.arange(5000), torch.arange(126_072, 131_072)])
    cos, sin = LlamaRotaryEmbedding(settings)(torch.zeros(1), positions[None])
    ours = rope_table(131_072, 128, 5e5, torch.device("cpu"), torch.float32, scaling)
    for mine, theirs in zip(ours, (cos, sin), strict=True):
        assert torch.equal(mine[positions, 0], theirs[0])
