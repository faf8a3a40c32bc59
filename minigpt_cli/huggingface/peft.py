"""Read and write LoRA adapters in PEFT's format."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.reading import read_json
from minigpt_cli.model import lora
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.gpt import GPT, meta_model
from minigpt_cli.recipe import AdapterSettings, out_of_range

_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_LARGEST_RANK = 1 << 20
_PREFIX = "base_model.model."
_SUFFIXES = {  # of the tensors' names: ours -> PEFT's
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "lora_magnitude_vector": ".lora_magnitude_vector",
}
# Settings of adapter_config.json that ask for more than LoRA, rank stabilisation and DoRA.
_UNSUPPORTED = (
    "alora_invocation_tokens", "alpha_pattern", "kasa_config", "layer_replication", "lora_bias",
    "modules_to_save", "rank_pattern", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_qalora",
)  # fmt: skip


def is_peft_adapter(path: Path) -> bool:
    """Whether ``path`` is a directory in PEFT's format."""
    return (path / _CONFIG).is_file()


def peft_base(path: Path) -> str:
    """Return the base model that an adapter in PEFT's format names: a directory or a Hub name.

    Raises:
        UserError: It names none.
    """
    name = read_json(path / _CONFIG).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{path}: the adapter names no base: give BASE --adapter {path}")
    return name


def read_peft(path: Path, model: GPT) -> tuple[AdapterSettings, dict[str, Tensor]]:
    """Read an adapter.

    Args:
        path: A directory in PEFT's format.
        model: The base, perhaps on the meta device; it gives the layers' names.

    Returns:
        The adapter's settings, and its tensors by our parameter names. Shapes are not checked.

    Raises:
        UserError: It can't be read, or needs features that minigpt doesn't support.
    """
    settings = _read_settings(path)
    file = path / _TENSORS
    if not file.is_file():
        pickle = "; adapter_model.bin is a pickle, which minigpt never reads"
        more = pickle if (path / "adapter_model.bin").exists() else ""
        raise UserError(f"{file}: no such file{more}")
    try:
        stored = load_file(file)
    except Exception as error:  # safetensors has no error of its own for Python
        raise UserError(f"{file}: is not a safetensors file: {error}") from None
    ours = {
        lora.module_name(model.config, n): n for n in lora.target_layers(model, (lora.ALL_LINEAR,))
    }
    tensors = {}
    for name, tensor in stored.items():
        kind = next((k for k, suffix in _SUFFIXES.items() if name.endswith(suffix)), None)
        module = name.removeprefix(_PREFIX).removesuffix(_SUFFIXES[kind]) if kind else name
        if kind is None or module not in ours:
            raise UserError(f"{path}: holds {name}, but the base has no such layer")
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {name} is of {tensor.dtype}, not of floating-point numbers")
        tensors[f"{ours[module]}.{kind}"] = tensor
    if not tensors:
        raise UserError(f"{file}: holds no adapter: is the download complete?")
    return settings, tensors


def _read_settings(path: Path) -> AdapterSettings:
    settings = read_json(path / _CONFIG)
    problems = [f"{name} {settings[name]!r}" for name in _UNSUPPORTED if settings.get(name)]
    if settings.get("peft_type") != "LORA":
        problems.append(f"peft_type {settings.get('peft_type')!r}")
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init not in ("gaussian", "orthogonal", "eva"):
        problems.append(f"init_lora_weights {init!r}, which changes the base")
    if settings.get("bias", "none") != "none":
        problems.append(f"bias {settings['bias']!r}")
    if problems:
        raise UserError(f"{path}: minigpt doesn't support adapters with {'; '.join(problems)}")
    try:
        rank = settings["r"]
        if type(rank) is not int or rank > _LARGEST_RANK:
            raise ValueError(f"r {rank!r}")
        shape = AdapterSettings(
            rank=rank,
            alpha=float(settings["lora_alpha"]),
            dropout=float(settings.get("lora_dropout") or 0.0),
            use_rslora=bool(settings.get("use_rslora")),
            use_dora=bool(settings.get("use_dora")),
        )
        problems = [f"{name}: {problem}" for name, problem in out_of_range(AdapterSettings, shape)]
        if problems:
            raise ValueError("; ".join(problems))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path / _CONFIG}: invalid adapter configuration: {error!r}") from None
    return shape


def write_peft(
    settings: AdapterSettings,
    tensors: dict[str, Tensor],
    config: ModelConfig,
    base: str,
    folder: Path,
) -> None:
    """Write an adapter in PEFT's format: two files.

    Args:
        settings: The adapter's.
        tensors: By our parameter names; they are stored in float32.
        config: The base model's.
        base: The directory or Hub name from which PEFT shall load the base.
        folder: Where the files go.
    """
    stored, modules = {}, []
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind == "lora_A":
            modules.append(module)
        theirs = _PREFIX + lora.module_name(config, module) + _SUFFIXES[kind]
        stored[theirs] = tensor.float().contiguous()
    save_file(stored, folder / _TENSORS, {"format": "pt"})
    content: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.use_rslora,
        "use_dora": settings.use_dora,
        "target_modules": _shortest_names(config, modules),
        "fan_in_fan_out": config.family == "gpt2",  # Conv1D stores its weights transposed
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    (folder / _CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shortest_names(config: ModelConfig, modules: list[str]) -> list[str]:
    """Return the shortest ends of transformers' names that select exactly these layers."""
    model = meta_model(config)
    names = [lora.module_name(config, module) for module in modules]
    for length in (1, 2):
        ends = sorted({".".join(name.split(".")[-length:]) for name in names})
        if set(lora.target_layers(model, tuple(ends))) == set(modules):
            return ends
    return sorted(names)
