"""The weights in a Hugging Face directory, compared with the model of its config.json.

Only safetensors are read. Reading a pickle (``.bin``) can run any code.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.core.reading import MAX_BYTES, read_json
from minigpt_cli.huggingface.bounds import check_sizes
from minigpt_cli.model.config import ModelConfig
from minigpt_cli.model.gpt import meta_model
from minigpt_cli.model.hf_names import huggingface_name, is_transposed

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_DOWNLOADED = ("*.json", "model*.safetensors", "*.txt", "*.jinja")  # of a model on the Hub
# Constants that older models saved among their weights.
_BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
_FLOATS = ("F64", "F32", "F16", "BF16")
_MODELS = (
    "A model is a directory: a run, a checkpoint, or a Hugging Face model, downloaded with: "
    "hf download ORG/NAME --local-dir DIR"
)
_SHOWN = 6  # names of each kind in a message


@dataclass(frozen=True)
class _Stored:
    """A tensor in a safetensors file."""

    file: Path
    name: str  # in the file
    dtype: str  # as safetensors names it: F32 ...
    shape: list[int]


@dataclass(frozen=True)
class LoadReport:
    """How a directory's tensors compare with the model. Names are transformers'.

    Attributes:
        directory: The Hugging Face directory.
        loaded: Tensors that fit.
        missing: Tensors that the model needs, and the directory lacks.
        unexpected: Further tensors of the transformer: it would compute something else.
        mismatched: Tensors of another shape or dtype, each with the reason.
        ignored: Buffers, and heads for other tasks.
        parameters: The number of parameters in ``loaded``.
    """

    directory: Path
    loaded: list[str]
    missing: list[str]
    unexpected: list[str]
    mismatched: list[str]
    ignored: list[str]
    parameters: int

    @property
    def fits(self) -> bool:
        """Whether the model can be loaded."""
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
    """The weights of a directory; none is read yet.

    Attributes:
        config: The model's.
        stored: Our parameter name -> the tensor in a file.
        report: How the tensors compare with the model.
    """

    config: ModelConfig
    stored: dict[str, _Stored]
    report: LoadReport

    def read(self, name: str) -> Tensor:
        """Read our parameter ``name`` in its stored dtype."""
        tensor = _read(self.stored[name])
        return tensor.T.contiguous() if is_transposed(self.config, name) else tensor


def model_directory(name: str) -> Path:
    """Return the directory of a model; a model on the Hub is downloaded first.

    Args:
        name: A directory, or the name of a model on the Hub: ORG/NAME.

    Raises:
        UserError: There is no such directory, and the model can't be downloaded.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(f"{name}: is a file; name the directory that holds the model")
    # If `runs` is a directory, `runs/missing` is a mistyped path and not a model on the Hub.
    is_path = not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) or Path(path.parts[0]).exists()
    if is_path:
        raise UserError(f"{name}: no such directory. {_MODELS}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_DOWNLOADED)))
    except Exception as error:  # of many types: no network, no such model, no permission
        raise UserError(
            f"{name}: no such directory, and no such model could be downloaded "
            f"({first_line(error)[:200]}). {_MODELS}"
        ) from None


def open_weights(directory: Path, config: ModelConfig) -> Weights:
    """Compare the files of a directory with the model of this config; read no weights.

    Raises:
        UserError: There are no safetensors, or a tensor is missing, unexpected or mismatched.
    """
    held = _tensors_in(directory)
    prefix = "transformer." if config.family == "gpt2" else "model."
    if not any(name.startswith(prefix) for name in held):  # saved without the head
        held = {
            name if name.startswith("lm_head.") else prefix + name: stored
            for name, stored in held.items()
        }
    shapes = {name: stored.shape for name, stored in held.items()}
    check_sizes(config, shapes, str(directory / CONFIG))
    fitting: dict[str, _Stored] = {}
    loaded: list[str] = []
    missing: list[str] = []
    mismatched: list[str] = []
    parameters = 0
    for name, parameter in meta_model(config).named_parameters():
        theirs = huggingface_name(config, name)
        shape = list(parameter.shape)[:: -1 if is_transposed(config, name) else 1]
        if theirs not in held:
            missing.append(theirs)
            continue
        stored = held.pop(theirs)
        if stored.shape != shape or stored.dtype not in _FLOATS:
            mismatched.append(f"{theirs} is {stored.dtype} {stored.shape}, not {shape}")
        else:
            fitting[name] = stored
            loaded.append(theirs)
            parameters += math.prod(shape)
    embeddings = fitting.get("embed_tokens.weight") if config.tie_word_embeddings else None
    head = held.pop("lm_head.weight", None) if embeddings is not None else None
    if embeddings and head and not torch.equal(_read(head), _read(embeddings)):
        mismatched.append("lm_head.weight differs from the embeddings that it is tied to")
    unexpected: list[str] = []
    ignored: list[str] = []
    for name in held:
        inside = name.startswith((prefix, "lm_head.")) and not _BUFFERS.search(name)
        (unexpected if inside else ignored).append(name)
    report = LoadReport(directory, loaded, missing, unexpected, mismatched, ignored, parameters)
    if not report.fits:
        raise UserError(f"{report}. The weights don't fit its {CONFIG}, so nothing was loaded")
    return Weights(config, fitting, report)


def _read(stored: _Stored) -> Tensor:
    with safe_open(stored.file, framework="pt") as opened:
        tensor: Tensor = opened.get_tensor(stored.name)
    return tensor


def _tensors_in(directory: Path) -> dict[str, _Stored]:
    """Return all tensors of a directory by their names; only headers are read."""
    found = {}
    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    part = opened.get_slice(name)
                    found[name] = _Stored(file, name, part.get_dtype(), part.get_shape())
        except Exception as error:  # safetensors has no error of its own for Python
            raise UserError(f"{file}: is not a safetensors file: {error}") from None
    return found


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a directory: one, or several with an index.

    Raises:
        UserError: There are none, or one that the index lists is missing.
    """
    if (directory / WEIGHTS).is_file():  # it counts more than an index, as in transformers
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        names = read_json(directory / INDEX, limit=MAX_BYTES).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise UserError(f"{directory / INDEX}: has no weight_map")
        files = sorted(set(names.values()))
        for name in files:
            if Path(name).name != name:
                raise UserError(f"{directory / INDEX}: names a file outside the directory: {name}")
            if not os.path.isfile(directory / name):  # False also for a name that is too long
                raise UserError(f"{directory / name}: is missing; {INDEX} names it")
        return [directory / name for name in files]
    raise UserError(
        f"{directory}: holds no {WEIGHTS}, nor a {INDEX}. Pickles (.bin) can run any code when "
        "they are read, so minigpt never reads them. If you trust one, convert it with "
        "transformers: from_pretrained(...).save_pretrained(OUT)"
    )
