"""A LoRA adapter with its base model: from PEFT's format or from a run of finetune-lora."""

import contextlib
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from minigpt_cli.checkpoint.shards import whole_reader
from minigpt_cli.checkpoint.state import read_state
from minigpt_cli.checkpoint.store import choose, list_steps, locate
from minigpt_cli.checkpoint.tensors import WEIGHTS_PREFIX
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.run_dir import RECIPE
from minigpt_cli.huggingface.auxiliary_files import (
    AuxiliaryFiles,
    auxiliary_files_of_checkpoint,
    read_auxiliary_files,
)
from minigpt_cli.huggingface.base_model import (
    BaseModel,
    open_base,
    weights_fingerprint,
    with_tokenizer,
)
from minigpt_cli.huggingface.origin import is_trained_here, read_origin
from minigpt_cli.huggingface.peft import is_peft_adapter, peft_base, read_peft
from minigpt_cli.huggingface.weights import CONFIG
from minigpt_cli.model import lora
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.gpt import GPT, copy_values, meta_model
from minigpt_cli.recipe import AdapterSettings, Recipe, load_recipe


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter with its tensors.

    Attributes:
        name: As the user gave it.
        shape: Its settings: rank, alpha, and so on.
        tensors: Our parameter name -> the whole tensor.
        recipe: The recipe of the run that trained it; None for PEFT's format.
        checkpoint: The run's checkpoint; None for PEFT's format.
        skipped_checkpoints: A line for each newer checkpoint that is damaged.
        trained_on: The ``weights_fingerprint`` of its base; None if minigpt didn't train it.
        auxiliary_files: Those beside the adapter.
    """

    name: str
    shape: AdapterSettings
    tensors: dict[str, Tensor]
    recipe: Recipe | None = None
    checkpoint: Path | None = None
    skipped_checkpoints: tuple[str, ...] = ()
    trained_on: str | None = None
    auxiliary_files: AuxiliaryFiles = field(default_factory=AuxiliaryFiles)

    @property
    def directory(self) -> Path:
        """The directory of its files; for a run, the checkpoint."""
        return self.checkpoint or Path(self.name)

    @property
    def modules(self) -> list[str]:
        """Our names of the layers that it changes."""
        return [name.removesuffix(".lora_A") for name in self.tensors if name.endswith(".lora_A")]


def trained_by_minigpt(base: BaseModel, adapter: LoadedAdapter | None) -> bool:
    """Whether minigpt trained the model last. It trains without special tokens before a text."""
    if adapter is not None:
        return adapter.recipe is not None or adapter.trained_on is not None
    return base.recipe is not None or is_trained_here(base.directory)


def origin_of(base: BaseModel, adapter: LoadedAdapter | None) -> dict[str, str]:
    """Return {"checkpoint": name}, of the last training; {} if it is unknown."""
    checkpoint = base.directory if adapter is None else adapter.checkpoint
    if checkpoint is not None and (adapter is not None or base.recipe is not None):
        return {"checkpoint": checkpoint.name}
    origin = read_origin(base.directory if adapter is None else adapter.directory) or {}
    return {"checkpoint": str(origin["checkpoint"])} if "checkpoint" in origin else {}


def open_model(path: Path, adapters: list[Path]) -> tuple[BaseModel, list[LoadedAdapter]]:
    """Open a model with its adapters.

    Args:
        path: A run, a checkpoint, a Hugging Face directory or a Hub name; or an adapter (a run of
            finetune-lora or PEFT's format), which names its base.
        adapters: More adapters, if ``path`` is a whole model.

    Raises:
        UserError: There is no such model, or an adapter belongs to another one.
        Damaged: A run has no valid checkpoint.
    """
    name = _base_name(path)
    if name is not None and adapters:
        raise UserError(f"{path}: is an adapter itself: name its base, and this one with --adapter")
    base = _open_named_base(path, name) if name is not None else open_base(path)
    opened = [open_adapter(each, base.config) for each in (adapters if name is None else [path])]
    _check_base(base, opened)
    for adapter in opened:
        base = with_tokenizer(base, adapter.directory)
    if len(opened) == 1:  # it may have been trained with another chat template
        files = base.auxiliary_files.files | opened[0].auxiliary_files.files
        base = replace(base, auxiliary_files=replace(base.auxiliary_files, files=files))
    skipped = [problem for adapter in opened for problem in adapter.skipped_checkpoints]
    return replace(base, skipped_checkpoints=(*base.skipped_checkpoints, *skipped)), opened


def _base_name(path: Path) -> str | None:
    """Return the base of the adapter at ``path``; None if it is a whole model, or nothing."""
    if is_peft_adapter(path):
        return peft_base(path)
    if (path / CONFIG).is_file() or not path.is_dir():
        return None
    run, checkpoint = locate(path)
    newest_first = [directory for _, directory in reversed(list_steps(run))]
    for folder in [checkpoint] if checkpoint is not None else [*newest_first[:2], run]:
        with contextlib.suppress(UserError):  # the checkpoints are verified later
            recipe = load_recipe(folder / RECIPE)
            if recipe.lora is not None:
                return recipe.lora.base
    return None


def _open_named_base(path: Path, name: str) -> BaseModel:
    """Open the base that an adapter names."""
    try:
        return open_base(name)
    except UserError as error:
        raise type(error)(
            f"{path}: its base can't be opened: {error}. Name the base: BASE --adapter {path}, or "
            "to resume: --set lora.base=BASE"
        ) from None


def _check_base(base: BaseModel, adapters: list[LoadedAdapter]) -> None:
    """Refuse an adapter that minigpt trained on other weights than the base's."""
    known = {each.name: each.trained_on for each in adapters if each.trained_on is not None}
    fingerprint = weights_fingerprint(base) if known else None
    for name, trained_on in known.items():
        if trained_on != fingerprint:
            raise UserError(
                f"{name} was not trained on the present weights of {base.name}; was that run "
                "resumed? Give the weights that it was trained on, or an export of them: "
                "BASE --adapter ..."
            )


def open_adapter(path: Path, config: ModelConfig) -> LoadedAdapter:
    """Read an adapter, and check that it fits the base.

    Args:
        path: A directory in PEFT's format, or a run of finetune-lora.
        config: The base model's.

    Raises:
        UserError: It is no adapter, has unsupported settings, or doesn't fit the base.
        Damaged: The run has no valid checkpoint.
    """
    like = meta_model(config)
    adapter = _adapter_of_peft(path, like) if is_peft_adapter(path) else adapter_of_run(path)
    linears = lora.target_layers(like, (lora.ALL_LINEAR,))
    if unknown := [name for name in adapter.modules if name not in linears]:
        raise UserError(f"{path}: has an adapter for {unknown[0]}, but the base has no such layer")
    lora.attach(like, adapter.shape, adapter.modules)
    wanted = {n: list(p.shape) for n, p in like.named_parameters() if lora.MARK in n}
    found = {name: list(tensor.shape) for name, tensor in adapter.tensors.items()}
    if wanted != found:
        names = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
        name = names[0]
        raise UserError(
            f"{path}: {name}: expected shape {wanted.get(name, 'absent')} for this base and the "
            f"adapter's settings, got {found.get(name, 'absent')} ({len(names)} such tensors)"
        )
    return adapter


def adapter_of_run(path: Path) -> LoadedAdapter:
    """Read the adapter that a run of finetune-lora trained.

    Raises:
        UserError: ``path`` is no such run.
        Damaged: It has no valid checkpoint.
    """
    run, checkpoint, manifest, skipped = choose(path)
    recipe = load_recipe(checkpoint / RECIPE, name=run.name)
    if recipe.lora is None:
        raise UserError(f"{path}: is a whole model, not an adapter")
    read = whole_reader(checkpoint, manifest.tensor_files, manifest.tensors)
    names = [name for name in manifest.tensors if name.startswith(WEIGHTS_PREFIX)]
    return LoadedAdapter(
        name=str(path),
        shape=recipe.lora.adapter,
        tensors={name.removeprefix(WEIGHTS_PREFIX): read(name) for name in names},
        recipe=recipe,
        checkpoint=checkpoint,
        skipped_checkpoints=tuple(skipped),
        trained_on=read_state(checkpoint).dataset.get("base"),
        auxiliary_files=auxiliary_files_of_checkpoint(checkpoint),
    )


def _adapter_of_peft(path: Path, model: GPT) -> LoadedAdapter:
    shape, tensors = read_peft(path, model)
    return LoadedAdapter(
        name=str(path),
        shape=shape,
        tensors=tensors,
        trained_on=(read_origin(path) or {}).get("base_sha256"),
        auxiliary_files=read_auxiliary_files(path, {}),
    )


def apply(model: GPT, adapter: LoadedAdapter | None) -> None:
    """Attach an adapter to a model in place of the one that it has.

    Args:
        model: The base model, unsharded.
        adapter: None: the model is left without an adapter.
    """
    lora.detach(model)
    if adapter is not None:
        lora.attach(model, adapter.shape, adapter.modules)
        for name, parameter in model.named_parameters():
            if lora.MARK in name:
                copy_values(parameter, adapter.tensors[name])
        model.to(model.embed_tokens.weight.dtype)  # the dtype of computation: no autocast here


def merge(base: BaseModel, adapter: LoadedAdapter) -> BaseModel:
    """Return the base with the adapter merged into its weights, in float32, as they are read."""
    tensors = adapter.tensors

    def read(name: str) -> Tensor:
        weight = base.read(name)
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or f"{module}.lora_A" not in tensors:
            return weight
        return lora.merge_weight(
            weight,
            tensors[f"{module}.lora_A"],
            tensors[f"{module}.lora_B"],
            adapter.shape.scale,
            tensors.get(f"{module}.lora_magnitude_vector"),
        )

    return replace(base, read=read)
