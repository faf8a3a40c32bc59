"""Adapters against PEFT's own: the same numbers in, the same logits and gradients out."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor

from minigpt_cli.core.errors import UserError
from minigpt_cli.huggingface.adapter import LoadedAdapter, apply
from minigpt_cli.model import lora
from minigpt_cli.model.config import model_config
from minigpt_cli.model.gpt import GPT, copy_values, fill_all_rows, initialize_weights
from minigpt_cli.model.hf_names import config_from_huggingface
from minigpt_cli.recipe import AdapterSettings
from tests.helpers.adapters import randomize
from tests.helpers.hf_layout import from_huggingface
from tests.helpers.models import random_model

KINDS = {
    "plain": AdapterSettings(rank=4, alpha=8.0),
    "rank-stabilised": AdapterSettings(rank=4, alpha=8.0, use_rslora=True),
    "dora": AdapterSettings(rank=4, alpha=8.0, use_dora=True),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
shapes = pytest.mark.parametrize("shape", ["gpt2", "llama", "llama-biases-tied", "qwen3"])
IDS = torch.randint(0, 320, (2, 41), generator=torch.Generator().manual_seed(1))


def small(family: str = "llama") -> GPT:
    config = model_config(
        family=family, vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    model = GPT(config)
    initialize_weights(model, 3)
    return model.eval()


def weights_of(model: GPT) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@kinds
@shapes
def test_logits_and_gradients_are_pefts(shape: str, kind: AdapterSettings):
    theirs = random_model(shape)
    config = config_from_huggingface(theirs.config.to_dict(), "config.json")
    ours = GPT(config)
    names = [name for name, _ in ours.named_parameters()]
    ours.load_state_dict(from_huggingface(config, names, theirs.state_dict()))
    lora.attach(ours.eval(), kind)
    values = randomize(ours)
    peft_model: Any = get_peft_model(
        theirs,
        LoraConfig(
            r=kind.rank, lora_alpha=kind.alpha, target_modules="all-linear", task_type="CAUSAL_LM",
            use_rslora=kind.use_rslora, use_dora=kind.use_dora,
        ),
    ).eval()  # fmt: skip
    parameters = dict(peft_model.named_parameters())
    of = {}
    for name in values:
        module, _, leaf = name.rpartition(".")
        middle = f"{lora.module_name(config, module)}.{leaf}.default"
        full = f"base_model.model.{middle}.weight"
        of[name] = parameters[full]
        copy_values(of[name], values[name])
    trained = [n for n, p in peft_model.named_parameters() if p.requires_grad]
    assert len(trained) == len(values)
    theirs_logits = peft_model(IDS[:, :-1]).logits
    torch.testing.assert_close(ours(IDS[:, :-1]), theirs_logits, rtol=0, atol=1e-4)
    loss = ours(IDS[:, :-1], IDS[:, 1:]) / 80
    their_loss = F.cross_entropy(theirs_logits.flatten(0, 1), IDS[:, 1:].flatten())
    torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    their_loss.backward()
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert gradients.keys() == values.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, of[name].grad, rtol=1e-3, atol=1e-5, msg=name)


@kinds
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_at_first_the_model_is_the_base_bit_for_bit(family: str, kind: AdapterSettings):
    model = small(family)
    ids, weights = torch.arange(32)[None], weights_of(model)
    before = model(ids)
    lora.attach(model, kind)
    lora.initialize_adapters(model, 1, weights.__getitem__, fill_all_rows)
    assert torch.equal(model(ids), before)
    assert {p.shape[0] for n, p in model.named_parameters() if n.endswith("lora_A")} == {4}
    lora.detach(model)
    assert torch.equal(model(ids), before)
    assert weights_of(model).keys() == weights.keys()


def test_initial_a_is_as_in_peft():
    model = small()
    weights = weights_of(model)
    drawn = []
    for seed in (1, 1, 2):
        lora.attach(model, AdapterSettings(rank=16))
        lora.initialize_adapters(model, seed, weights.__getitem__, fill_all_rows)
        drawn.append(model.layers[0].mlp.up_proj.lora_A.detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[2], model.layers[1].mlp.up_proj.lora_A)
    bound = 24**-0.5  # kaiming_uniform_ with a = sqrt(5)
    assert drawn[0].abs().max() <= bound
    assert drawn[0].std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


@kinds
@shapes
def test_merged_equals_unmerged(shape: str, kind: AdapterSettings):
    config = config_from_huggingface(random_model(shape).config.to_dict(), "config.json")
    model = GPT(config).eval()
    initialize_weights(model, 3)
    lora.attach(model, kind)
    randomize(model)
    with torch.no_grad():
        before = model(IDS)
        layers = lora.adapted(model)
        for layer in layers.values():
            copy_values(
                layer.weight,
                lora.merge_weight(
                    layer.weight, layer.lora_A, layer.lora_B, layer.scale,
                    layer.lora_magnitude_vector,
                ),
            )  # fmt: skip
        lora.detach(model)
        assert before.abs().max() < 30
        torch.testing.assert_close(
            model(IDS), before, rtol=0, atol=1e-5 * float(before.abs().max())
        )


def test_the_scale_is_alpha_by_rank_or_by_its_root():
    assert AdapterSettings(rank=16, alpha=32).scale == 2
    assert AdapterSettings(rank=16, alpha=32, use_rslora=True).scale == 8


@pytest.mark.parametrize(
    ("family", "names", "expected"),
    [
        ("llama", ("q_proj", "v_proj"), {"self_attn.q_proj", "self_attn.v_proj"}),
        ("gpt2", ("c_attn",), {"self_attn.qkv_proj"}),
        ("gpt2", ("c_proj",), {"self_attn.o_proj", "mlp.down_proj"}),
        ("gpt2", ("attn.c_proj", "c_fc"), {"self_attn.o_proj", "mlp.up_proj"}),
        ("gpt2", ("all-linear",), {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.up_proj",
                                   "mlp.down_proj"}),
    ],
)  # fmt: skip
def test_layers_are_named_as_peft_names_them(family: str, names: tuple, expected: set):
    model = small(family)
    found = lora.target_layers(model, names)
    assert {name.split(".", 2)[2] for name in found} == expected
    assert len(found) == 2 * len(expected)


@pytest.mark.parametrize("name", ["proj", "lm_head", "k_norm", "layers.0", ""])
def test_a_name_that_no_layer_has_is_refused(name: str):
    with pytest.raises(UserError, match=r"no layer is called .* o_proj, gate_proj"):
        lora.target_layers(small(), ("q_proj", name))


def test_adapters_swap_on_one_base():
    model = small()
    ids = torch.arange(32)[None]
    base = model(ids)
    loaded, logits = [], []
    for number, kind in enumerate(
        [*KINDS.values(), AdapterSettings(rank=2, target_modules=("q_proj",))]
    ):
        lora.attach(model, kind)
        values = randomize(model, number)
        loaded.append(LoadedAdapter(str(number), kind, values))
        logits.append(model(ids))
    for one, expected in zip(reversed(loaded), reversed(logits), strict=True):
        apply(model, one)
        assert torch.equal(model(ids), expected)
        assert not torch.equal(expected, base)
    apply(model, None)
    assert torch.equal(model(ids), base)


def test_a_length_that_grows_a_little_shows_in_bf16():
    """In bf16 itself 1.003 is 1."""
    model = small()
    weights = weights_of(model)
    lora.attach(model, AdapterSettings(rank=2, use_dora=True))
    lora.initialize_adapters(model, 1, weights.__getitem__, fill_all_rows)
    layer, x = model.layers[0].mlp.up_proj, torch.randn(500, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = layer(x).float()
        layer.lora_magnitude_vector.mul_(1.003)
        ratio = layer(x).float().abs().mean() / before.abs().mean()
    assert ratio == pytest.approx(1.003, abs=5e-4)


def test_gradients_and_dropout():
    model = small()
    lora.attach(model, AdapterSettings(rank=2, dropout=0.5))
    randomize(model)
    ids = torch.arange(32)[None]
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))
    model(ids, ids).backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if "lora_" in name}


def test_the_recipe_s_section_is_an_adapter():
    from minigpt_cli.recipe import LoraSettings

    settings = LoraSettings(base="x", rank=3, alpha=5, target_modules=("q_proj",), use_dora=True)
    assert settings.adapter == AdapterSettings(
        rank=3, alpha=5, target_modules=("q_proj",), use_dora=True
    )
    assert {f.name for f in dataclasses.fields(LoraSettings)} - {"base"} == {
        f.name for f in dataclasses.fields(AdapterSettings)
    }
