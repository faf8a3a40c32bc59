"""Hugging Face directories: what is in them, compared with the model it should make.

Only safetensors are read. Pickles (``.bin``) can run any code when they are opened.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.gpt import GPT
from minigpt_cli.model.hf_names import huggingface_name, is_transposed

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_WANTED = ("*.json", "model*.safetensors", "*.txt", "*.jinja")  # of a model on the Hub
# Constants that older models saved beside their weights.
_BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
_FLOATS = ("F64", "F32", "F16", "BF16")
_SHOWN = 6  # names of each kind in a message


@dataclass(frozen=True)
class LoadReport:
    """The tensors of a directory, by transformers' names."""

    directory: Path
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]  # within the transformer, which would compute something else
    mismatched: list[str]  # with the reason
    ignored: list[str]  # buffers, and heads for other tasks
    parameters: int

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        counts = [f"{len(self.loaded)} tensors fit ({self.parameters:,} parameters)"]
        for kind in ("missing", "unexpected", "mismatched", "ignored"):
            if names := getattr(self, kind):
                more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                counts.append(f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}")
        return f"{self.directory}: {'; '.join(counts)}"


@dataclass(frozen=True)
class Weights:
    """Where each of our parameters lies in a directory's files."""

    config: ModelConfig
    places: dict[str, tuple[Path, str]]  # our name -> file, name in it
    report: LoadReport

    def read(self, name: str) -> Tensor:
        """The whole of our parameter ``name``, in the dtype that it is stored in."""
        file, stored = self.places[name]
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(stored)
        return tensor.T.contiguous() if is_transposed(self.config, name) else tensor


def find(name: str) -> Path:
    """The directory that ``name`` means; a model on the Hub is fetched first.

    Raises:
        UserError: it isn't here and can't be fetched.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+|[\w-][\w.-]*", name):
        raise UserError(f"{name}: no such directory, nor the name of a model on the Hub (ORG/NAME)")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_WANTED)))
    except Exception as error:  # of many kinds: no network, no such model, no right to it
        raise UserError(
            f"{name}: no such directory here, and it can't be fetched from the Hub: "
            f"{first_line(error)}"
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        UserError: it isn't there, or isn't one.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: can't be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: is not a JSON object")
    return content


def weights_of(directory: Path, config: ModelConfig) -> Weights:
    """What the directory's files hold, compared with the model of this shape.

    Raises:
        UserError: there are no safetensors, or something is missing, unexpected or mismatched.
    """
    held = _tensors_in(directory)
    prefix = "transformer." if config.family == "gpt2" else "model."
    if not any(name.startswith(prefix) for name in held):  # saved without the head
        held = {
            name if name.startswith("lm_head.") else prefix + name: entry
            for name, entry in held.items()
        }
    with torch.device("meta"):
        wanted = dict(GPT(config).named_parameters())
    places, loaded, missing, mismatched = {}, [], [], []
    for name, parameter in wanted.items():
        theirs = huggingface_name(config, name)
        shape = list(parameter.shape)[:: -1 if is_transposed(config, name) else 1]
        if theirs not in held:
            missing.append(theirs)
            continue
        file, stored, dtype, stored_shape = held.pop(theirs)
        if stored_shape != shape or dtype not in _FLOATS:
            mismatched.append(f"{theirs} is {dtype} {stored_shape}, not {shape}")
        else:
            places[name] = (file, stored)
            loaded.append(theirs)
    if config.tie_word_embeddings and "lm_head.weight" in held and "embed_tokens.weight" in places:
        file, stored, _, _ = held.pop("lm_head.weight")
        embeddings = places["embed_tokens.weight"]
        if not torch.equal(_read(file, stored), _read(*embeddings)):
            mismatched.append("lm_head.weight differs from the embeddings that it is tied to")
    unexpected: list[str] = []
    ignored: list[str] = []
    for name in held:
        inside = name.startswith((prefix, "lm_head.")) and not _BUFFERS.search(name)
        (unexpected if inside else ignored).append(name)
    report = LoadReport(
        directory, loaded, missing, unexpected, mismatched, ignored,
        sum(math.prod(p.shape) for name, p in wanted.items() if name in places),
    )  # fmt: skip
    if not report.fits:
        raise UserError(f"{report}. It is not the model of its {CONFIG}, so nothing was loaded")
    return Weights(config, places, report)


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def _tensors_in(directory: Path) -> dict[str, tuple[Path, str, str, list[int]]]:
    """Name -> file, name in it, dtype, shape; of all that the directory holds."""
    found = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    found[name] = (file, name, part.get_dtype(), part.get_shape())
        except Exception as error:  # safetensors has no error of its own for Python
            raise UserError(f"{file}: is not a safetensors file: {error}") from None
    return found


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, one or several with an index.

    Raises:
        UserError: there are none, or the index names what isn't there.
    """
    if (directory / WEIGHTS).is_file():  # also beside an index, as transformers takes it
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        names = read_json(directory / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise UserError(f"{directory / INDEX}: has no weight_map")
        files = sorted(set(names.values()))
        for name in files:
            if Path(name).name != name:
                raise UserError(f"{directory / INDEX}: names a file outside the directory: {name}")
            if not (directory / name).is_file():
                raise UserError(f"{directory / name}: is missing; {INDEX} names it")
        return [directory / name for name in files]
    raise UserError(
        f"{directory}: holds no {WEIGHTS}, nor a {INDEX}. Pickles (.bin) can run any code when "
        "they are read, so minigpt never does; one that you trust transformers can save as "
        "safetensors, with from_pretrained(...).save_pretrained(OUT)"
    )
