"""Whole state dicts to and from transformers' names and layout."""

from torch import Tensor

from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.hf_names import huggingface_name, is_transposed


def to_huggingface(config: ModelConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under transformers' names, in its layout."""
    return {
        huggingface_name(config, name): (
            tensor.T.contiguous() if is_transposed(config, name) else tensor
        )
        for name, tensor in weights.items()
    }


def from_huggingface(
    config: ModelConfig, names: list[str], weights: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters that we call ``names``, taken from transformers' state dict."""
    found = {}
    for name in names:
        tensor = weights[huggingface_name(config, name)]
        found[name] = tensor.T if is_transposed(config, name) else tensor
    return found
