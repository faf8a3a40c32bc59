"""LoRA adapters on disk, in PEFT's format: written by minigpt or by PEFT, read by both."""

import contextlib
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.state import read_state
from minigpt_cli.checkpoint.tensors import WEIGHTS, whole_reader
from minigpt_cli.core.errors import UserError
from minigpt_cli.huggingface.base_model import (
    AuxiliaryFiles,
    Base,
    auxiliary_files_of_checkpoint,
    open_base,
    read_auxiliary_files,
    weights_fingerprint,
    with_tokenizer,
)
from minigpt_cli.huggingface.weights import CONFIG as MODEL_CONFIG
from minigpt_cli.huggingface.weights import read_json
from minigpt_cli.model import lora
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.gpt import GPT, copy_values
from minigpt_cli.recipe import AdapterSettings, Recipe, load_recipe

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
ORIGIN = "minigpt.json"  # in what minigpt trained: the checkpoint, and what an adapter's base was
_PREFIX = "base_model.model."
_SUFFIXES = {
    "lora_A": ".lora_A.weight",
    "lora_B": ".lora_B.weight",
    "lora_magnitude_vector": ".lora_magnitude_vector",
}
# What an adapter_config.json may ask for beside plain LoRA, rank stabilisation and DoRA.
_UNKNOWN = (
    "alora_invocation_tokens", "alpha_pattern", "kasa_config", "layer_replication", "lora_bias",
    "modules_to_save", "rank_pattern", "target_parameters", "trainable_token_indices",
    "use_bdlora", "use_qalora",
)  # fmt: skip


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter with its numbers."""

    name: str
    shape: AdapterSettings
    tensors: dict[str, Tensor]  # by our parameters' names
    recipe: Recipe | None = None  # of the run that trained it
    checkpoint: Path | None = None
    skipped_checkpoints: tuple[str, ...] = ()  # newer checkpoints that are damaged, and how
    trained_on: str | None = None  # the base's fingerprint, where minigpt trained it
    auxiliary_files: AuxiliaryFiles = field(default_factory=AuxiliaryFiles)

    @property
    def directory(self) -> Path:
        """Of its files; of a run, the checkpoint."""
        return self.checkpoint or Path(self.name)

    @property
    def modules(self) -> list[str]:
        """Our names of the layers that it belongs to."""
        return [name.removesuffix(".lora_A") for name in self.tensors if name.endswith(".lora_A")]


def is_ours(base: Base, adapter: LoadedAdapter | None) -> bool:
    """Whether minigpt trained it last, and so without special tokens before a text."""
    if adapter is not None:
        return adapter.recipe is not None or adapter.trained_on is not None
    return base.recipe is not None or (base.directory / ORIGIN).is_file()


def origin_of(base: Base, adapter: LoadedAdapter | None) -> dict[str, str]:
    """Which checkpoint it is, where that is known, for ``ORIGIN``."""
    checkpoint = base.directory if adapter is None else adapter.checkpoint
    if checkpoint is not None and (adapter is not None or base.recipe is not None):
        return {"checkpoint": checkpoint.name}
    file = (base.directory if adapter is None else adapter.directory) / ORIGIN
    told = read_json(file).get("checkpoint") if file.is_file() else None
    return {} if told is None else {"checkpoint": str(told)}


def is_adapter(path: Path) -> bool:
    """Whether it is a directory in PEFT's format."""
    return (path / CONFIG).is_file()


def open_model(path: Path, adapters: list[Path]) -> tuple[Base, list[LoadedAdapter]]:
    """What ``path`` means, with the adapters for it.

    Args:
        path: a run, a checkpoint, a Hugging Face directory or a Hub id; or an adapter, from
            finetune-lora or PEFT, which says what its base is.
        adapters: where ``path`` is a whole model.

    Raises:
        UserError: there is no model there, or an adapter is for another one.
        Damaged: no checkpoint is valid.
    """
    name = _base_name(path)
    if name is not None and adapters:
        raise UserError(f"{path}: is an adapter itself: name its base, and this one with --adapter")
    base = _base_of(path, name) if name is not None else open_base(path)
    opened = [open_adapter(each, base.config) for each in (adapters if name is None else [path])]
    _check_base(base, opened)
    for adapter in opened:
        base = with_tokenizer(base, adapter.directory)
    if len(opened) == 1:  # it was trained with, among them, perhaps another chat template
        tokens, files = base.auxiliary_files.special_tokens, base.auxiliary_files.files
        mine = AuxiliaryFiles(tokens, files | opened[0].auxiliary_files.files)
        base = replace(base, auxiliary_files=mine)
    skipped_checkpoints = [problem for adapter in opened for problem in adapter.skipped_checkpoints]
    return replace(
        base, skipped_checkpoints=(*base.skipped_checkpoints, *skipped_checkpoints)
    ), opened


def _base_of(path: Path, name: str) -> Base:
    """The base that an adapter names.

    Raises:
        UserError: it isn't there.
        Damaged: no checkpoint of it is valid.
    """
    try:
        return open_base(name)
    except UserError as error:
        raise type(error)(
            f"{path}: its base can't be had: {error}. Give it: BASE --adapter {path}, or to go on "
            "--set lora.base=BASE"
        ) from None


def _check_base(base: Base, adapters: list[LoadedAdapter]) -> None:
    """Refuse an adapter of ours beside other weights than it was trained on, whatever their name.

    Raises:
        UserError: the base is another one.
    """
    known = {each.name: each.trained_on for each in adapters if each.trained_on is not None}
    identity = weights_fingerprint(base) if known else None
    for name, trained_on in known.items():
        if trained_on == identity:
            continue
        raise UserError(
            f"{name} was not trained on {base.name} as it is now; did that run go on? Give "
            "what it was trained on, or an export of it: BASE --adapter ..."
        )


def _base_name(path: Path) -> str | None:
    """The base of the adapter at ``path``; None where it is a whole model, or nothing."""
    if is_adapter(path):
        name = read_json(path / CONFIG).get("base_model_name_or_path")
        if not isinstance(name, str) or not name:
            raise UserError(f"{path}: an adapter that names no base: give BASE --adapter {path}")
        return name
    if (path / MODEL_CONFIG).is_file() or not path.is_dir():
        return None
    run, checkpoint = store.locate(path)
    newest_first = [directory for _, directory in reversed(store.list_steps(run))]
    for folder in [checkpoint] if checkpoint is not None else [*newest_first[:2], run]:
        with contextlib.suppress(UserError):  # which of them is valid is looked at later
            recipe = load_recipe(folder / "recipe.toml")
            if recipe.lora is not None:
                return recipe.lora.base
    return None


def open_adapter(path: Path, config: ModelConfig) -> LoadedAdapter:
    """The adapter at ``path``: a directory in PEFT's format, or a run of finetune-lora's.

    Args:
        config: of the base that it is for.

    Raises:
        UserError: it is none, does what minigpt doesn't, or is for another model.
    """
    with torch.device("meta"):
        like = GPT(config)
    adapter = _of_peft(path, like) if is_adapter(path) else of_run(path)
    lora.attach(like, adapter.shape, _known(adapter.modules, like, path))
    wanted = {n: p.shape for n, p in like.named_parameters() if lora.MARK in n}
    found = {name: tensor.shape for name, tensor in adapter.tensors.items()}
    if wanted != found:
        names = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        name = names[0]
        raise UserError(
            f"{path}: {name} is {_shape(found.get(name))}, and should be "
            f"{_shape(wanted.get(name))} for this base ({len(names)} such tensors)"
        )
    return adapter


def _known(modules: list[str], model: GPT, path: Path) -> list[str]:
    linears = lora.target_layers(model, (lora.ALL_LINEAR,))
    if unknown := [name for name in modules if name not in linears]:
        raise UserError(f"{path}: has an adapter for {unknown[0]}, which the base has no layer for")
    return modules


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(list(shape))


def of_run(path: Path) -> LoadedAdapter:
    """The adapter that a run of finetune-lora's has trained.

    Raises:
        UserError: it isn't one.
    """
    run, checkpoint, manifest, skipped_checkpoints = store.choose(path)
    recipe = load_recipe(checkpoint / "recipe.toml", name=run.name)
    if recipe.lora is None:
        raise UserError(f"{path}: is a whole model, not an adapter")
    files = [name for name in manifest.files if name.endswith(".safetensors")]
    read = whole_reader(checkpoint, files, manifest.tensors)
    names = [name for name in manifest.tensors if name.startswith(WEIGHTS)]
    return LoadedAdapter(
        name=str(path),
        shape=recipe.lora.adapter,
        tensors={name.removeprefix(WEIGHTS): read(name) for name in names},
        recipe=recipe,
        checkpoint=checkpoint,
        skipped_checkpoints=tuple(skipped_checkpoints),
        trained_on=read_state(checkpoint).dataset.get("base"),
        auxiliary_files=auxiliary_files_of_checkpoint(checkpoint),
    )


def _of_peft(path: Path, model: GPT) -> LoadedAdapter:
    settings = read_json(path / CONFIG)
    problems = [f"{name} {settings[name]!r}" for name in _UNKNOWN if settings.get(name)]
    if settings.get("peft_type") != "LORA":
        problems.append(f"peft_type {settings.get('peft_type')!r}")
    begun = settings.get("init_lora_weights")
    if isinstance(begun, str) and begun not in ("gaussian", "orthogonal", "eva"):
        problems.append(f"init_lora_weights {begun!r}, which changes the base")
    if settings.get("bias", "none") != "none":
        problems.append(f"bias {settings['bias']!r}")
    if problems:
        raise UserError(f"{path}: minigpt has no adapters with {'; '.join(problems)}")
    try:
        shape = AdapterSettings(
            rank=int(settings["r"]),
            alpha=float(settings["lora_alpha"]),
            dropout=float(settings.get("lora_dropout") or 0.0),
            use_rslora=bool(settings.get("use_rslora")),
            use_dora=bool(settings.get("use_dora")),
        )
        if shape.rank < 1:
            raise ValueError(f"r {shape.rank}")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path / CONFIG}: is not an adapter's configuration: {error!r}") from None
    if not (path / TENSORS).is_file():
        pickle = "; adapter_model.bin is a pickle, which minigpt never reads"
        more = pickle if (path / "adapter_model.bin").exists() else ""
        raise UserError(f"{path / TENSORS}: no such file{more}")
    try:
        stored = load_file(path / TENSORS)
    except Exception as error:  # safetensors has no error of its own for Python
        raise UserError(f"{path / TENSORS}: is not a safetensors file: {error}") from None
    ours = {
        lora.module_name(model.config, n): n for n in lora.target_layers(model, (lora.ALL_LINEAR,))
    }
    tensors = {}
    for name, tensor in stored.items():
        kind = next((k for k, suffix in _SUFFIXES.items() if name.endswith(suffix)), None)
        module = name.removeprefix(_PREFIX).removesuffix(_SUFFIXES[kind]) if kind else name
        if kind is None or module not in ours:
            raise UserError(f"{path}: holds {name}, which the base has no layer for")
        tensors[f"{ours[module]}.{kind}"] = tensor
    origin = read_json(path / ORIGIN) if (path / ORIGIN).is_file() else {}
    return LoadedAdapter(
        str(path),
        shape,
        tensors,
        trained_on=origin.get("base_sha256"),
        auxiliary_files=read_auxiliary_files(path, {}),
    )


def apply(model: GPT, adapter: LoadedAdapter | None) -> None:
    """Put an adapter beside the model's layers in the place of the one it has; None: no adapter."""
    lora.detach(model)
    if adapter is not None:
        lora.attach(model, adapter.shape, adapter.modules)
        for name, parameter in model.named_parameters():
            if lora.MARK in name:
                copy_values(parameter, adapter.tensors[name])
        model.to(model.embed_tokens.weight.dtype)  # as the model is computed in, without autocast


def merge(base: Base, adapter: LoadedAdapter) -> Base:
    """The base with the adapter's changes in its weights, computed in float32 as they are read."""
    a = adapter

    def read(name: str) -> Tensor:
        weight = base.read(name)
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or f"{module}.lora_A" not in a.tensors:
            return weight
        return lora.merge_weight(
            weight,
            a.tensors[f"{module}.lora_A"],
            a.tensors[f"{module}.lora_B"],
            a.shape.scale,
            a.tensors.get(f"{module}.lora_magnitude_vector"),
        )

    return replace(base, read=read)


def write_adapter(adapter: LoadedAdapter, config: ModelConfig, base: str, folder: Path) -> None:
    """Write PEFT's two files.

    Args:
        base: what PEFT is to load the base from.
    """
    with torch.device("meta"):
        model = GPT(config)
    s = adapter.shape
    tensors = {}
    for name, tensor in adapter.tensors.items():
        module, _, kind = name.rpartition(".")
        theirs = _PREFIX + lora.module_name(config, module) + _SUFFIXES[kind]
        tensors[theirs] = tensor.float().contiguous()
    save_file(tensors, folder / TENSORS, {"format": "pt"})
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": s.rank,
        "lora_alpha": s.alpha,
        "lora_dropout": s.dropout,
        "use_rslora": s.use_rslora,
        "use_dora": s.use_dora,
        "target_modules": _shortest(model, adapter.modules),
        "fan_in_fan_out": config.family == "gpt2",  # Conv1D stores its weights transposed
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _shortest(model: GPT, modules: list[str]) -> list[str]:
    """Ends of transformers' names that mean these layers and no others."""
    names = [lora.module_name(model.config, module) for module in modules]
    for length in (1, 2):
        ends = sorted({".".join(name.split(".")[-length:]) for name in names})
        if set(lora.target_layers(model, tuple(ends))) == set(modules):
            return ends
    return sorted(names)
