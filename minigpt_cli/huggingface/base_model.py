"""A trained model to start from: a Hugging Face directory, a model on the Hub, or a minigpt run.

Names and shapes are compared before any weight is read, and weights are read one tensor at a time.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minigpt_cli.checkpoint.shards import whole_reader
from minigpt_cli.checkpoint.store import choose
from minigpt_cli.checkpoint.tensors import WEIGHTS_PREFIX
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.reading import parse_json, read_json
from minigpt_cli.core.run_dir import RECIPE, TOKENIZER
from minigpt_cli.data import chat
from minigpt_cli.data.tokenizer import eos_id, is_tokenizer, load_tokenizer, vocabulary_size
from minigpt_cli.huggingface.auxiliary_files import (
    GENERATION_CONFIG,
    AuxiliaryFiles,
    auxiliary_files_of_checkpoint,
    files_beside,
    read_auxiliary_files,
)
from minigpt_cli.huggingface.bounds import check_checkpoint_sizes
from minigpt_cli.huggingface.peft import is_peft_adapter
from minigpt_cli.huggingface.weights import CONFIG, model_directory, open_weights
from minigpt_cli.model.config import ModelConfig, config_from_recipe
from minigpt_cli.model.gpt import GPT, meta_model
from minigpt_cli.model.hf_names import config_from_huggingface
from minigpt_cli.recipe import (
    DataTokenizer,
    Origin,
    Recipe,
    changed_settings,
    load_recipe,
    setting_names,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class BaseModel:
    """A trained model: its config, and how to read its weights.

    Attributes:
        name: As the user gave it.
        directory: The directory of its files; for a run, the checkpoint.
        config: The model's sizes and options.
        tokenizer: The tokenizer's file or directory.
        auxiliary_files: Chat template, special tokens and generation settings.
        read: Reads a whole parameter, by our name for it, in its stored dtype.
        report: What was found, in one line.
        recipe: The run's recipe; None for a Hugging Face model.
        skipped_checkpoints: A line for each newer checkpoint that is damaged.
    """

    name: str
    directory: Path
    config: ModelConfig
    tokenizer: Path
    auxiliary_files: AuxiliaryFiles
    read: Callable[[str], Tensor]
    report: str
    recipe: Recipe | None = None
    skipped_checkpoints: tuple[str, ...] = ()


def open_base(name: str | Path) -> BaseModel:
    """Open a trained model; its weights are not read yet.

    Args:
        name: A run, a checkpoint, a Hugging Face directory, or the name of a model on the Hub.

    Raises:
        UserError: There is no such model, or it has an unsupported architecture.
        Damaged: It is a run without a valid checkpoint.
    """
    path = Path(name).expanduser()
    if is_peft_adapter(path):
        raise UserError(f"{name}: is an adapter, not a whole model: merge it first, with export")
    if path.is_dir() and not (path / CONFIG).is_file():
        return _open_run(path)
    directory = model_directory(str(name))
    settings = read_json(directory / CONFIG)
    config = config_from_huggingface(settings, str(directory / CONFIG))
    weights = open_weights(directory, config)
    return BaseModel(
        name=str(name),
        directory=directory,
        config=config,
        tokenizer=directory,
        auxiliary_files=read_auxiliary_files(directory, settings),
        read=weights.read,
        report=str(weights.report),
    )


def _open_run(path: Path) -> BaseModel:
    run, checkpoint, manifest, skipped = choose(path)
    recipe = load_recipe(checkpoint / RECIPE, name=run.name)
    if recipe.lora is not None:
        raise UserError(
            f"{path}: holds adapters, not a whole model: merge them first, with minigpt export"
        )
    tokenizer = checkpoint / TOKENIZER
    config = config_from_recipe(recipe, vocabulary_size(load_tokenizer(tokenizer)))
    check_checkpoint_sizes(config, manifest, str(checkpoint / RECIPE))
    read = whole_reader(checkpoint, manifest.tensor_files, manifest.tensors)
    return BaseModel(
        name=str(path),
        directory=checkpoint,
        config=config,
        tokenizer=tokenizer,
        auxiliary_files=auxiliary_files_of_checkpoint(checkpoint),
        read=lambda name: read(WEIGHTS_PREFIX + name),
        report=f"{checkpoint}, step {manifest.step}",
        recipe=recipe,
        skipped_checkpoints=tuple(skipped),
    )


def with_tokenizer(base: BaseModel, path: Path) -> BaseModel:
    """Add the tokenizer at ``path``, and the files beside it, if the model has no tokenizer."""
    if is_tokenizer(base.tokenizer) or not is_tokenizer(path):
        return base
    theirs = base.auxiliary_files
    theirs = replace(theirs, files=files_beside(path) | theirs.files)
    return replace(base, tokenizer=path, auxiliary_files=theirs)


def stop_token_ids(base: BaseModel, tokenizer: "Tokenizer") -> frozenset[int]:
    """Return the tokens that end a generated text.

    They are named by config.json, by generation_config.json, and by the tokenizer's files.
    """
    found = [base.auxiliary_files.special_token_ids.get("eos_token_id")]
    with base.auxiliary_files.directory(base.tokenizer) as folder:
        if (name := chat.special_tokens(folder).get("eos_token")) is not None:
            found.append(tokenizer.token_to_id(name))
    text = base.auxiliary_files.files.get(GENERATION_CONFIG, "{}")
    with contextlib.suppress(UserError):
        found.append(parse_json(text, GENERATION_CONFIG).get("eos_token_id"))
    ids = [each for ids in found for each in (ids if isinstance(ids, list) else [ids])]
    return frozenset(each for each in ids if isinstance(each, int))


def start_token_id(base: BaseModel, tokenizer: "Tokenizer") -> int:
    """Return the token before a text without context: begin-of-text, or else end-of-text."""
    with base.auxiliary_files.directory(base.tokenizer) as folder:
        named = chat.special_tokens(folder)
    for name in ("bos_token", "eos_token"):
        if (found := tokenizer.token_to_id(named.get(name, ""))) is not None:
            return int(found)
    return eos_id(tokenizer)


def weights_fingerprint(base: BaseModel) -> str:
    """Return the sha256 (hex) of a model's weights: the same for a run and for its export."""
    digest = hashlib.sha256()
    for name in parameter_names(base.config):
        tensor = base.read(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parameter_names(config: ModelConfig) -> list[str]:
    """Return our names of a model's parameters, without those of adapters."""
    return [name for name, _ in meta_model(config).named_parameters()]


def load_base(base: BaseModel, model: GPT, assign: Callable[[Tensor, Tensor], None]) -> None:
    """Load the weights into a model, which may have adapters.

    Args:
        base: Where the weights are read from.
        model: Of the same config; it may be sharded.
        assign: Fills a parameter (the first) from its whole values (the second).
    """
    parameters = dict(model.named_parameters())
    for name in parameter_names(base.config):
        assign(parameters[name], base.read(name))


def complete_recipe(recipe: Recipe, base: BaseModel) -> Recipe:
    """Fill in the recipe's ``[model]`` from a base model, and the tokenizer if none is named.

    Raises:
        UserError: The recipe contradicts the base model; all differences are listed.
    """
    theirs = {f.name: getattr(base.config, f.name) for f in fields(base.config)}
    del theirs["dropout"]  # a setting of the training
    ours = {name: getattr(recipe.model, name) for name in theirs}
    positions = base.config.max_position_embeddings
    if recipe.train.sequence_length > positions:
        raise UserError(
            f"[train] sequence_length {recipe.train.sequence_length} is longer than the "
            f"{positions} positions of {base.directory}"
        )
    conflicts = [
        f"{name} = {ours[name]} (there: {theirs[name]})"
        for name in theirs
        if name != "initializer_range" and ours[name] not in (None, theirs[name])
    ]
    if conflicts:
        raise UserError(
            f"[model] contradicts {base.directory}: {', '.join(conflicts)}; leave these settings "
            "out, they come from there"
        )
    data = recipe.data
    if data.source is not None and data.tokenizer is None:
        data = replace(data, tokenizer=DataTokenizer(path=str(base.tokenizer)))
    done = replace(recipe, model=replace(recipe.model, **theirs), data=data)
    changed = [key for key, _, _ in changed_settings(recipe, done)]
    origin: dict[str, Origin] = {
        **dict.fromkeys(setting_names(done), "default"),
        **recipe.origin,
        **dict.fromkeys(changed, "base"),
    }
    return _with_absolute_path(replace(done, origin=origin), base)


def _with_absolute_path(recipe: Recipe, base: BaseModel) -> Recipe:
    """Make the base's path absolute, so that the recipe works in other working directories."""
    folder = Path(base.name).expanduser()
    if not folder.is_dir():  # a model on the Hub
        return recipe
    path = os.path.abspath(folder)
    if recipe.lora is not None:
        return replace(recipe, lora=replace(recipe.lora, base=path))
    return replace(recipe, model=replace(recipe.model, init_from=path))
