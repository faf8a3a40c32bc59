"""The gpt2 model against its equations in NumPy, where the gradients are worked out by hand."""

import numpy as np
import pytest
import torch

from minigpt_cli.model.config import model_config
from minigpt_cli.model.gpt import GPT, initialize_weights
from tests.helpers.reference import IGNORE_INDEX, gpt2_loss_and_gradients

HEADS = 3


@pytest.fixture
def model():
    config = model_config(
        family="gpt2",
        vocab_size=19,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=9,
        initializer_range=0.3,
    )
    model = GPT(config)
    initialize_weights(model, 0)
    model.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # zeros and ones would hide what biases and gains do
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                noise = torch.empty_like(parameter).normal_(0, 0.3, generator=generator)
                parameter.add_(noise)
    return model


@pytest.fixture
def batch():
    """Ids with repeats, fewer than the model has positions, and some targets that don't count."""
    generator = np.random.default_rng(2)
    ids, targets = generator.integers(19, size=(2, 3, 7))
    targets[0, 2] = targets[2, 5:] = IGNORE_INDEX
    return ids, targets


def numpy_weights(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mean", [False, True])
def test_loss_and_gradients(model, batch, mean):
    ids, targets = batch
    expected, gradients = gpt2_loss_and_gradients(
        numpy_weights(model), ids, targets, heads=HEADS, mean=mean
    )
    loss = model(torch.tensor(ids), torch.tensor(targets))
    if mean:
        loss = loss / (targets != IGNORE_INDEX).sum()
    loss.backward()
    assert loss.dtype == torch.float64
    assert abs(loss.item() - expected) < 1e-9
    ours = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        np.testing.assert_allclose(ours[name], gradient, rtol=0, atol=1e-9, err_msg=name)
        assert np.abs(gradient).max() > 1e-3, f"{name} has no gradient to compare"


def test_reference_gradients_are_slopes(model, batch):
    ids, targets = batch
    weights = numpy_weights(model)

    def loss():
        return gpt2_loss_and_gradients(weights, ids, targets, heads=HEADS)[0]

    _, gradients = gpt2_loss_and_gradients(weights, ids, targets, heads=HEADS)
    generator = np.random.default_rng(3)
    step = 1e-5
    for name, weight in weights.items():
        for _ in range(3):
            entry = tuple(generator.integers(weight.shape))
            value = weight[entry]
            weight[entry] = value + step
            above = loss()
            weight[entry] = value - step
            below = loss()
            weight[entry] = value
            slope = (above - below) / (2 * step)
            assert abs(slope - gradients[name][entry]) < 1e-6 * (1 + abs(slope)), (name, entry)
