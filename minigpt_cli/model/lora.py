"""Low-rank adapters beside frozen weights (Hu et al. 2021): y = W x + b + scale * B A x.

A is random and B zero, so that at first the model is the base. ``use_dora`` also trains the length
of each row of W + scale * B A (Liu et al. 2024). Parameters are named and scaled as PEFT's.
"""

import hashlib
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt_cli.core.errors import UserError
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.gpt import GPT
from minigpt_cli.model.hf_names import huggingface_name
from minigpt_cli.recipe import AdapterSettings

ALL = "all-linear"  # PEFT's name for every linear layer but the head
MARK = "lora_"  # in the names of the parameters that are trained


class LoraLinear(nn.Linear):
    """A linear layer with an adapter; its weight and bias keep their names."""

    def __init__(self, linear: nn.Linear, adapter: AdapterSettings):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.training = linear.weight, linear.bias, linear.training
        self.scale, self.dropout = adapter.scale, adapter.dropout
        new = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
        device = linear.weight.device
        self.lora_A = nn.Parameter(
            torch.empty(adapter.rank, self.in_features, dtype=new, device=device)
        )
        self.lora_B = nn.Parameter(
            torch.empty(self.out_features, adapter.rank, dtype=new, device=device)
        )
        self.lora_magnitude_vector = (
            nn.Parameter(torch.empty(self.out_features, dtype=new, device=device))
            if adapter.use_dora
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.lora_A)
        change = F.linear(low, self.lora_B) * self.scale
        if self.lora_magnitude_vector is None:
            return F.linear(x, self.weight, self.bias) + change
        lengths = row_lengths(self.weight, self.lora_A, self.lora_B, self.scale)
        whole = F.linear(x, self.weight) + change
        # Not in bf16, in which a length that has grown by 0.3% is the same.
        y = (whole * (self.lora_magnitude_vector / lengths)).to(whole.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def row_lengths(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The length of each row of ``weight + scale * b @ a``, (out,), without a gradient (Liu et al.
    2024, section 4.3)."""
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.addmm(weight.to(dtype), b.to(dtype), a.to(dtype), alpha=scale).norm(dim=1)


def targets(model: GPT, names: tuple[str, ...]) -> list[str]:
    """Our names of the linear layers that ``names`` mean: ends of transformers' names, as PEFT
    reads them (``q_proj``, ``attn.c_proj``), or ``all-linear``.

    Raises:
        UserError: a name that no layer has.
    """
    theirs = {
        name: module_name(model.config, name)
        for name, module in model.layers.named_modules(prefix="layers")
        if isinstance(module, nn.Linear)
    }
    found = set()
    for wanted in names:
        matching = {
            name
            for name, full in theirs.items()
            if wanted == ALL or full == wanted or full.endswith("." + wanted)
        }
        if not matching:
            known = dict.fromkeys(full.rpartition(".")[2] for full in theirs.values())
            raise UserError(
                f"[lora] target_modules: no layer is called {wanted}; of a {model.config.family} "
                f"they are {', '.join(known)}, or {ALL} for all of them"
            )
        found |= matching
    return [name for name in theirs if name in found]


def module_name(config: ModelConfig, name: str) -> str:
    """What transformers calls the module that we call ``name``."""
    return huggingface_name(config, f"{name}.weight").removesuffix(".weight")


def attach(model: GPT, adapter: AdapterSettings, names: list[str] | None = None) -> None:
    """Put adapters beside the model's linear layers and freeze all else; they have no values yet.

    Adapters that the model has already are dropped.

    Args:
        names: our names of the layers, where they are known; else ``target_modules`` says.
    """
    detach(model)
    for name in names if names is not None else targets(model, adapter.target_modules):
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, leaf, LoraLinear(getattr(module, leaf), adapter))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(MARK in name)


def detach(model: GPT) -> None:
    """Take the adapters away: what stays is the base."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            parent, _, leaf = name.rpartition(".")
            linear = nn.Linear(module.in_features, module.out_features, device="meta")
            linear.weight, linear.bias, linear.training = (
                module.weight,
                module.bias,
                module.training,
            )
            setattr(model.get_submodule(parent), leaf, linear)


def adapted(model: GPT) -> dict[str, LoraLinear]:
    """Our name -> layer, of those that have an adapter."""
    return {n: module for n, module in model.named_modules() if isinstance(module, LoraLinear)}


def initialize(
    model: GPT,
    seed: int,
    read: Callable[[str], Tensor],
    assign: Callable[[Tensor, Tensor], None],
) -> None:
    """Draw A as PEFT does (Kaiming uniform, a = sqrt(5)), each from a generator of (seed, name), so
    that sharding doesn't matter; B is 0, and DoRA's lengths are those of the base's rows.

    Args:
        read: the whole of a parameter of the base.
        assign: see ``gpt.initialize``.
    """
    for name, layer in adapted(model).items():
        digest = hashlib.sha256(f"{seed}:{name}.lora_A".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        bound = 1 / math.sqrt(layer.in_features)
        values = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        assign(layer.lora_A, values)
        assign(layer.lora_B, torch.zeros(layer.lora_B.shape))
        if layer.lora_magnitude_vector is not None:
            weight = read(f"{name}.weight").to(layer.weight.dtype)  # as the model rounds it
            assign(layer.lora_magnitude_vector, weight.to(layer.lora_A.dtype).norm(dim=1))


def merged(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None
) -> Tensor:
    """The weight of one layer without an adapter that computes the same, in float32: (out, in)."""
    whole = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
    if magnitude is None:
        return whole
    return whole * (magnitude.float() / whole.norm(dim=1))[:, None]
