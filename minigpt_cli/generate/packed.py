"""Weights in oneDNN's own layout, for decoding on a CPU.

A step of decoding multiplies few rows by every weight, so reading the weights decides its speed.
torch's products read them at half of the memory's speed, and rearrange bf16 weights in each call.
"""

import platform

import torch
from torch import Tensor, nn

from minigpt_cli.model.block import MLP
from minigpt_cli.model.gpt import GPT


class PackedLinear(nn.Module):
    """A linear layer for inference; its weight can't be read back."""

    def __init__(self, weight: Tensor, bias: Tensor | None, gelu: bool = False):
        """Pack a weight.

        Args:
            gelu: also apply GELU to the result, as model/gelu.py does.
        """
        super().__init__()
        self.bias = bias
        self.then: tuple[str, str] = ("gelu", "tanh") if gelu else ("none", "")
        # The operations with which torch.compile packs weights.
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        name, form = self.then
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, name, [], form)
        return out


def can_pack(model: GPT) -> bool:
    """Return whether this machine packs weights of the model's dtype."""
    weight = model.embed_tokens.weight
    if weight.device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or bf16


def pack_weights(model: GPT) -> None:
    """Pack the weights of all linear layers without an adapter, in place, where it is possible.

    The model can then only compute logits. Rounding differs from that of other products.
    """
    if not can_pack(model):
        return
    model.packed_head = PackedLinear(model.head_weight(), None)
    if not model.config.tie_word_embeddings:
        del model.lm_head  # frees its weight, as below
    for parent in list(model.layers.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                gelu = name == "up_proj" and isinstance(parent, MLP) and parent.gpt2
                setattr(parent, name, PackedLinear(layer.weight, layer.bias, gelu))
                if isinstance(parent, MLP):
                    parent.gelu_in_up_proj |= gelu
