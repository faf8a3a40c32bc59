"""Low-rank adapters beside frozen weights (Hu et al. 2021): y = W x + b + scale * B A x.

A is random and B zero, so that training starts from the base model. ``use_dora`` also trains the
length of each row of W + scale * B A (Liu et al. 2024). Names and scales are those of PEFT.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.seed import derived_seed
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.gpt import GPT, Rows
from minigpt_cli.model.hf_names import huggingface_name
from minigpt_cli.model.random_rows import random_rows
from minigpt_cli.recipe import AdapterSettings

ALL_LINEAR = "all-linear"  # PEFT's name for every linear layer but the head
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
        # In float32: bf16 would round away a change of a length by 0.3%.
        y = (whole * (self.lora_magnitude_vector / lengths)).to(whole.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def row_lengths(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute the length of each row of ``weight + scale * b @ a``, (out,).

    It gets no gradient (Liu et al. 2024, section 4.3).
    """
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return torch.addmm(weight.to(dtype), b.to(dtype), a.to(dtype), alpha=scale).norm(dim=1)


def target_layers(model: GPT, names: tuple[str, ...]) -> list[str]:
    """Find linear layers by name.

    Args:
        names: ends of transformers' names, as PEFT reads them (``q_proj``, ``attn.c_proj``), or
            ``all-linear``.

    Returns:
        Our names of the layers, in the model's order.

    Raises:
        UserError: no layer has one of the names.
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
            if wanted == ALL_LINEAR or full == wanted or full.endswith("." + wanted)
        }
        if not matching:
            known = dict.fromkeys(full.rpartition(".")[2] for full in theirs.values())
            raise UserError(
                f"[lora] target_modules: no layer is called {wanted}; of a {model.config.family} "
                f"they are {', '.join(known)}, or {ALL_LINEAR} for all of them"
            )
        found |= matching
    return [name for name in theirs if name in found]


def module_name(config: ModelConfig, name: str) -> str:
    """Return transformers' name of our module ``name``."""
    return huggingface_name(config, f"{name}.weight").removesuffix(".weight")


def attach(model: GPT, adapter: AdapterSettings, names: list[str] | None = None) -> None:
    """Add adapters to linear layers and freeze all other parameters.

    The adapters have no values yet. Earlier adapters of the model are removed.

    Args:
        names: our names of the layers; default: those of ``target_modules``.
    """
    detach(model)
    for name in names if names is not None else target_layers(model, adapter.target_modules):
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, leaf, LoraLinear(getattr(module, leaf), adapter))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(MARK in name)


def detach(model: GPT) -> None:
    """Remove the adapters; the base model remains."""
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
    """Return the layers with an adapter, by our names."""
    return {n: module for n, module in model.named_modules() if isinstance(module, LoraLinear)}


def initialize_adapters(
    model: GPT,
    seed: int,
    read: Callable[[str], Tensor],
    fill: Callable[[Tensor, Rows], None],
) -> None:
    """Draw A as PEFT does (Kaiming uniform, a = sqrt(5)) and set B to 0.

    DoRA's lengths start as those of the base's rows. Each A is drawn from (seed, name), so that
    sharding doesn't matter.

    Args:
        read: returns the full values of a parameter of the base.
        fill: see ``gpt.initialize_weights``.
    """
    for name, layer in adapted(model).items():
        a_seed, bound = derived_seed(seed, f"{name}.lora_A"), 1 / math.sqrt(layer.in_features)
        fill(layer.lora_A, _uniform_rows(layer.lora_A.shape, a_seed, bound))
        nn.init.zeros_(layer.lora_B)
        if layer.lora_magnitude_vector is not None:
            # First in the dtype of the model's copy, which may be rounded.
            weight = read(f"{name}.weight").to(layer.weight.dtype)
            lengths = weight.to(layer.lora_A.dtype).norm(dim=1)
            fill(layer.lora_magnitude_vector, _rows_of(lengths))


def _uniform_rows(shape: torch.Size, seed: int, bound: float) -> Rows:
    def draw(values: Tensor, generator: torch.Generator) -> None:
        values.uniform_(-bound, bound, generator=generator)

    return lambda begin, end: random_rows(shape, begin, end, seed, draw)


def _rows_of(values: Tensor) -> Rows:
    return lambda begin, end: values[begin:end]


def merge_weight(
    weight: Tensor, a: Tensor, b: Tensor, scale: float, magnitude: Tensor | None = None
) -> Tensor:
    """Merge an adapter into the weight of its layer, in float32: (out, in)."""
    whole = torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)
    if magnitude is None:
        return whole
    return whole * (magnitude.float() / whole.norm(dim=1))[:, None]
