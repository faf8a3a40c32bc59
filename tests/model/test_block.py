"""Linear layers of one input by one product, as on a GPU, against separate layers."""

import pytest
import torch
from torch import nn

from minigpt_cli.model import block, lora
from minigpt_cli.model.block import project
from minigpt_cli.model.config import model_config
from minigpt_cli.model.gpt import GPT, initialize_weights
from minigpt_cli.recipe import AdapterSettings
from tests.helpers.ops import CountOps

TOKENS, HIDDEN = 10, 8
GROUPED = (16, 4, 4)  # queries, keys, values


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(block, "ONE_PRODUCT", {"cpu"})


def integers(*shape, seed=0):
    """Small integers: all sums of products of two such tensors are exact in bf16."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def separate_layers(bias):
    layers = [nn.Linear(HIDDEN, size, bias=bias) for size in GROUPED]
    for number, layer in enumerate(layers):
        for parameter in layer.parameters():
            parameter.data = integers(*parameter.shape, seed=number + parameter.ndim)
    return layers


@pytest.mark.parametrize("bias", [False, True])
def test_one_product_equals_separate_layers(bias):
    layers = separate_layers(bias)
    x = integers(TOKENS, HIDDEN, seed=7).bfloat16().requires_grad_()
    grads = [integers(TOKENS, size, seed=size) for size in GROUPED]
    with CountOps() as forward, torch.autocast("cpu", torch.bfloat16):
        out = project(x, *layers)
    assert forward.products == 1
    with CountOps() as backward:
        torch.autograd.backward(out, [grad.bfloat16() for grad in grads])
    assert backward.products == 2

    exact = x.detach().double().requires_grad_()
    parameters = [p for layer in layers for p in layer.parameters()]
    copies = [p.detach().double().requires_grad_() for p in parameters]
    each = iter(copies)
    expected = [exact @ next(each).T + (next(each) if bias else 0) for _ in GROUPED]  # weight, bias
    torch.autograd.backward(expected, [grad.double() for grad in grads])
    for mine, theirs in zip(out, expected, strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine.double(), theirs)
    assert torch.equal(x.grad.double(), exact.grad)
    for p, copy in zip(parameters, copies, strict=True):
        assert p.grad.dtype == torch.float32
        assert torch.equal(p.grad.double(), copy.grad)


def test_weights_that_are_not_cast_stay_apart():
    layers, x = separate_layers(bias=True), integers(TOKENS, HIDDEN)
    with CountOps() as count:
        out = project(x, *layers)
    assert count.products == 3
    assert all(torch.equal(a, layer(x)) for a, layer in zip(out, layers, strict=True))


def test_a_layer_with_an_adapter_keeps_it():
    adapted = lora.LoraLinear(separate_layers(bias=False)[1], AdapterSettings(rank=2, alpha=4.0))
    for matrix in (adapted.lora_A, adapted.lora_B):
        matrix.data = integers(*matrix.shape, seed=3)
    layers = separate_layers(bias=False)
    layers[1], x = adapted, integers(TOKENS, HIDDEN).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = project(x, *layers)
        assert torch.equal(out[1], adapted(x))
        assert not torch.equal(out[1], separate_layers(bias=False)[1](x))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_is_the_same_with_one_product(family, monkeypatch):
    """Grouped heads, biases, several sequences."""
    model = GPT(
        model_config(
            family=family, vocab_size=50, hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
            attention_bias=True,
        )
    )  # fmt: skip
    initialize_weights(model, 0)
    ids = torch.randint(50, (3, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for devices in ({"cpu"}, set()):
        monkeypatch.setattr(block, "ONE_PRODUCT", devices)
        with CountOps() as count, torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, ids)
        grads = torch.autograd.grad(loss, model.parameters())
        found.append((count.products, loss.detach(), grads))
    (fewer, loss, grads), (more, expected_loss, expected_grads) = found
    assert more - fewer == 2 * 2  # two products fewer in each block
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=0)
    for name, mine, theirs in zip(
        dict(model.named_parameters()), grads, expected_grads, strict=True
    ):
        assert (mine - theirs).norm() <= 0.02 * theirs.norm() + 1e-3, name
