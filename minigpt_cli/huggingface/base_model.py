"""Weights to start from: a Hugging Face directory, a model on the Hub, or a run of minigpt's.

Everything is compared before anything is assigned, and read one tensor at a time.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.tensors import WEIGHTS, whole_reader
from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.data import chat
from minigpt_cli.data.tokenizer import eos_id, is_tokenizer, load_tokenizer, vocabulary_size
from minigpt_cli.huggingface.weights import CONFIG, find, read_json, weights_of
from minigpt_cli.model.config import ModelConfig, config_from_recipe
from minigpt_cli.model.gpt import GPT
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

AUXILIARY_FILES = "huggingface.json"  # in a checkpoint: the AuxiliaryFiles of what it started from
_GENERATION = "generation_config.json"
_AUXILIARY_NAMES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    _GENERATION,
)
_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class AuxiliaryFiles:
    """What stands beside a model's weights and says how to use it; carried from the base through
    the checkpoints into an export."""

    special_tokens: dict[str, Any] = field(default_factory=dict)  # of config.json: eos_token_id ...
    files: dict[str, str] = field(default_factory=dict)  # name -> text

    def __bool__(self) -> bool:
        return bool(self.special_tokens or self.files)

    def with_template(self, chat_template: str | None) -> "AuxiliaryFiles":
        """Also the template that conversations were rendered with."""
        if chat_template is None:
            return self
        return replace(self, files=self.files | {"chat_template.jinja": chat_template})

    def dump(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class Base:
    """A trained model's weights and what belongs to them."""

    name: str  # as it was given
    directory: Path  # of the files; of a run, the checkpoint
    config: ModelConfig
    tokenizer: Path
    auxiliary_files: AuxiliaryFiles
    read: Callable[[str], Tensor]  # our parameter's name -> all of it, as it is stored
    report: str  # what was found, for a person
    recipe: Recipe | None = None  # of a run
    skipped_checkpoints: tuple[str, ...] = ()  # newer checkpoints that are damaged, and how


def open_base(name: str | Path) -> Base:
    """What ``name`` means: a run, a checkpoint, a Hugging Face directory or a Hub id.

    Raises:
        UserError: there is none of these, or a model that minigpt has no like of.
        Damaged: a run without a valid checkpoint.
    """
    path = Path(name).expanduser()
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{name}: is an adapter, not a whole model: merge it first, with export")
    if path.is_dir() and not (path / CONFIG).is_file():
        return _of_run(path)
    return _of_huggingface(str(name))


def _of_huggingface(name: str) -> Base:
    directory = find(name)
    settings = read_json(directory / CONFIG)
    config = config_from_huggingface(settings, str(directory / CONFIG))
    weights = weights_of(directory, config)
    return Base(
        name=name,
        directory=directory,
        config=config,
        tokenizer=directory,
        auxiliary_files=read_auxiliary_files(directory, settings),
        read=weights.read,
        report=str(weights.report),
    )


def with_tokenizer(base: Base, path: Path) -> Base:
    """The base, with the tokenizer at ``path``, and what stands beside it, where the weights came
    without any."""
    if is_tokenizer(base.tokenizer) or not is_tokenizer(path):
        return base
    theirs = base.auxiliary_files
    files = files_beside(path) | theirs.files
    return replace(
        base, tokenizer=path, auxiliary_files=AuxiliaryFiles(theirs.special_tokens, files)
    )


def files_beside(tokenizer: Path) -> dict[str, str]:
    """Name -> text, of what stands beside a tokenizer and belongs to it."""
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    files = read_auxiliary_files(folder, {}).files
    return {name: text for name, text in files.items() if name != _GENERATION}


def read_auxiliary_files(directory: Path, settings: dict[str, Any]) -> AuxiliaryFiles:
    """Those of a directory as transformers writes it; ``settings`` are its config.json."""
    try:
        return AuxiliaryFiles(
            {name: settings[name] for name in _SPECIAL_TOKENS if settings.get(name) is not None},
            {
                name: (directory / name).read_text(encoding="utf-8")
                for name in _AUXILIARY_NAMES
                if (directory / name).is_file()
            },
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{directory}: the tokenizer's files can't be read: {error}") from None


def _of_run(path: Path) -> Base:
    run, checkpoint, manifest, skipped_checkpoints = store.choose(path)
    recipe = load_recipe(checkpoint / "recipe.toml", name=run.name)
    if recipe.lora is not None:
        raise UserError(
            f"{path}: holds adapters, not a whole model: merge them first, with minigpt export"
        )
    tokenizer = checkpoint / "tokenizer.json"
    files = [name for name in manifest.files if name.endswith(".safetensors")]
    read = whole_reader(checkpoint, files, manifest.tensors)
    return Base(
        name=str(path),
        directory=checkpoint,
        config=config_from_recipe(recipe, vocabulary_size(load_tokenizer(tokenizer))),
        tokenizer=tokenizer,
        auxiliary_files=auxiliary_files_of_checkpoint(checkpoint),
        read=lambda name: read(WEIGHTS + name),
        report=f"{checkpoint}, step {manifest.step}",
        recipe=recipe,
        skipped_checkpoints=tuple(skipped_checkpoints),
    )


def auxiliary_files_of_checkpoint(checkpoint: Path) -> AuxiliaryFiles:
    """Those that a checkpoint carries; none where it began from random weights."""
    file = checkpoint / AUXILIARY_FILES
    if not file.exists():
        return AuxiliaryFiles()
    content = read_json(file)
    tokens, files = content.get("special_tokens"), content.get("files")
    if not (
        isinstance(tokens, dict)
        and isinstance(files, dict)
        and tokens.keys() <= set(_SPECIAL_TOKENS)
        and files.keys() <= set(_AUXILIARY_NAMES)  # others might lead anywhere
        and all(isinstance(text, str) for text in files.values())
    ):
        raise Damaged(f"{file}: is not what minigpt writes")
    return AuxiliaryFiles(tokens, files)


def chat_template(
    tokenizer: Path, auxiliary_files: AuxiliaryFiles
) -> tuple[str | None, dict[str, str]]:
    """The chat template that came with a model, and the special tokens that it may name.

    Args:
        tokenizer: its file or directory, where there are no auxiliary_files to ask.
    """
    loaded = load_tokenizer(tokenizer)
    names = {"eos_token": str(loaded.id_to_token(eos_id(loaded)))}
    with _folder_of(tokenizer, auxiliary_files) as folder:
        return chat.tokenizer_template(folder), names | chat.special_tokens(folder)


@contextlib.contextmanager
def _folder_of(tokenizer: Path, auxiliary_files: AuxiliaryFiles) -> Iterator[Path]:
    """A directory with the auxiliary_files' files; where there are none, the tokenizer's own."""
    if not auxiliary_files.files:
        yield tokenizer if tokenizer.is_dir() else tokenizer.parent
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, text in auxiliary_files.files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        yield Path(folder)


def ends(base: Base, tokenizer: "Tokenizer") -> frozenset[int]:
    """The tokens that end what a model writes, as its config.json, its generation settings and
    what stands beside its tokenizer say."""
    found = [base.auxiliary_files.special_tokens.get("eos_token_id")]
    with _folder_of(base.tokenizer, base.auxiliary_files) as folder:
        if (name := chat.special_tokens(folder).get("eos_token")) is not None:
            found.append(tokenizer.token_to_id(name))
    with contextlib.suppress(ValueError, AttributeError, KeyError):
        settings = json.loads(base.auxiliary_files.files[_GENERATION])
        found.append(settings.get("eos_token_id"))
    ids = [each for ids in found for each in (ids if isinstance(ids, list) else [ids])]
    return frozenset(each for each in ids if isinstance(each, int))


def weights_fingerprint(base: Base) -> str:
    """sha256 (hex) of its weights, whatever files they lie in: a run's are its export's."""
    digest = hashlib.sha256()
    for name in parameter_names(base.config):
        tensor = base.read(name)
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def parameter_names(config: ModelConfig) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in GPT(config).named_parameters()]


def load_base(base: Base, model: GPT, assign: Callable[[Tensor, Tensor], None]) -> None:
    """Fill a model's own parameters, not those of adapters; see ``gpt.initialize`` for assign."""
    parameters = dict(model.named_parameters())
    for name in parameter_names(base.config):
        assign(parameters[name], base.read(name))


def complete_recipe(recipe: Recipe, base: Base) -> Recipe:
    """The recipe with ``[model]`` filled in from the base, and the tokenizer where it names none.

    Raises:
        UserError: it says otherwise than the base, all differences listed.
    """
    theirs = {f.name: getattr(base.config, f.name) for f in fields(base.config)}
    del theirs["dropout"]  # training's business
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
            f"[model] says otherwise than {base.directory}: {', '.join(conflicts)}; leave out what "
            "comes from there"
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
    return _elsewhere(replace(done, origin=origin), base)


def _elsewhere(recipe: Recipe, base: Base) -> Recipe:
    """The recipe with the base's whole path, so that it holds in other working directories."""
    folder = Path(base.name).expanduser()
    if not folder.is_dir():  # a name on the Hub
        return recipe
    path = os.path.abspath(folder)
    if recipe.lora is not None:
        return replace(recipe, lora=replace(recipe.lora, base=path))
    return replace(recipe, model=replace(recipe.model, init_from=path))
