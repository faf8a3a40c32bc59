"""Packed weights: the same logits and tokens as without them, and as transformers' tokens."""

import pytest
import torch

from minigpt_cli.generate.engine import generate, generate_each
from minigpt_cli.generate.packed import PackedLinear, can_pack, pack_weights
from minigpt_cli.generate.sampling import SamplingOptions
from minigpt_cli.huggingface.base_model import load_base, open_base
from minigpt_cli.model import lora
from minigpt_cli.model.gpt import GPT, copy_values, fill_all_rows
from minigpt_cli.recipe import AdapterSettings
from tests.helpers.models import SHAPES, saved_model

GREEDY = SamplingOptions(temperature=0.0)
IDS = torch.randint(0, 320, (3, 20), generator=torch.Generator().manual_seed(0))


def load(shape, folder, license_dataset):
    theirs, directory = saved_model(shape, folder / "in", license_dataset)
    base = open_base(directory)
    model = GPT(base.config).eval()
    load_base(base, model, copy_values)
    if not can_pack(model):
        pytest.skip("this machine doesn't pack weights")
    return model, theirs


def packed_layers(model):
    return [name for name, layer in model.named_modules() if isinstance(layer, PackedLinear)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_logits_and_tokens(shape, tmp_path, license_dataset):
    model, theirs = load(shape, tmp_path, license_dataset)
    expected = model(IDS).detach()
    pack_weights(model)
    assert len(packed_layers(model)) == 1 + model.config.num_hidden_layers * (
        4 if model.config.family == "gpt2" else 7
    )
    torch.testing.assert_close(model(IDS), expected, rtol=0, atol=1e-4)
    with pytest.raises(AssertionError, match="packed weights are for logits only"):
        model(IDS, IDS)
    prompts = IDS.tolist()
    for rows in (prompts[:1], prompts):  # one row takes other kernels than several
        steps = generate_each(model, rows, GREEDY, max_new_tokens=12, finished=[False] * len(rows))
        ids = torch.tensor(rows)
        written = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, min_new_tokens=12,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )[:, 20:]  # fmt: skip
        assert torch.tensor(list(steps)).T.tolist() == written.tolist()


def test_bf16_is_as_close_as_without(tmp_path, license_dataset):
    model, _ = load("llama", tmp_path, license_dataset)
    exact = model(IDS).detach()
    model.to(torch.bfloat16)
    if not can_pack(model):
        pytest.skip("this machine packs no bf16")
    plain = (model(IDS).float() - exact).norm()
    pack_weights(model)
    assert packed_layers(model)
    packed = (model(IDS).float() - exact).norm()
    assert 1e-4 * exact.norm() < packed < 1.1 * plain
    assert len(list(generate(model, [1], GREEDY, max_new_tokens=3))) == 3


@pytest.mark.parametrize(("family", "layer"), [("llama", "q_proj"), ("gpt2", "c_fc")])
def test_layers_with_an_adapter_stay(tmp_path, license_dataset, family, layer):
    model, _ = load(family, tmp_path, license_dataset)
    lora.attach(model, AdapterSettings(rank=2, alpha=4.0, target_modules=(layer,)))
    lora.initialize_adapters(model, 0, lambda name: model.get_parameter(name), fill_all_rows)
    for layer in lora.adapted(model).values():
        torch.nn.init.normal_(layer.lora_B)
    expected = model(IDS).detach()
    pack_weights(model)
    assert len(lora.adapted(model)) == model.config.num_hidden_layers
    torch.testing.assert_close(model(IDS).detach(), expected, rtol=0, atol=1e-4)


def test_float64_is_not_packed(tmp_path, license_dataset):
    model, _ = load("gpt2", tmp_path, license_dataset)
    model.double()
    pack_weights(model)
    assert not packed_layers(model)
