"""Write a trained model as a Hugging Face directory, one tensor at a time.

transformers reloads it and computes the same, before it gets its name.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minigpt_cli.checkpoint.store import list_steps
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.files import whole_directory
from minigpt_cli.core.memory import format_size
from minigpt_cli.core.run_dir import CHECKPOINTS, FINAL, RECIPE, STATE, TOKENIZER, is_checkpoint
from minigpt_cli.data.chat import TOKENIZER_CONFIG
from minigpt_cli.data.tokenizer import eos_id, load_tokenizer, vocabulary_size
from minigpt_cli.huggingface.adapter import LoadedAdapter
from minigpt_cli.huggingface.auxiliary_files import GENERATION_CONFIG
from minigpt_cli.huggingface.base_model import (
    BaseModel,
    open_base,
    stop_token_ids,
    weights_fingerprint,
)
from minigpt_cli.huggingface.check_export import ExportCheck, check_export
from minigpt_cli.huggingface.origin import EXPORTED, write_origin
from minigpt_cli.huggingface.peft import write_peft
from minigpt_cli.huggingface.weights import CONFIG, INDEX
from minigpt_cli.model.cost import parameter_count
from minigpt_cli.model.gpt import meta_model
from minigpt_cli.model.hf_names import huggingface_config, huggingface_name, is_transposed
from minigpt_cli.model.precision import DTYPES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SHARD_BYTES = 5_000_000_000
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Exported:
    """An export.

    Attributes:
        path: Its directory.
        files: The names of its files.
        parameters: The number of the model's parameters.
        check: Whether transformers computes the same.
    """

    path: Path
    files: list[str]
    parameters: int
    check: ExportCheck


def export_model(
    base: BaseModel,
    out: Path,
    dtype: str = "fp32",
    *,
    files: dict[str, str],
    origin: dict[str, str] | None = None,
    replace: bool = False,
    shard_bytes: int = _SHARD_BYTES,
) -> Exported:
    """Write a model as a directory that transformers reads.

    Args:
        base: The model.
        out: The directory. It appears when it is complete and checked.
        dtype: Of the stored weights: fp32, bf16 or fp16.
        files: Name -> content, of further files: README.md.
        origin: For a model that minigpt trained, the content of minigpt.json; see
            ``origin_text``.
        replace: Replace ``out`` if it exists and holds only what an export writes.
        shard_bytes: The size limit of a safetensors file; a larger tensor gets its own file.

    Raises:
        UserError: ``out`` exists, lies in a run's checkpoints, or can't be written to.
        Mismatch: transformers computes something else; ``out`` is as it was.
    """
    _refuse_in_checkpoints(out)
    if replace:
        _refuse_foreign_files(out)
    with whole_directory(out, replace) as folder:
        size = parameter_count(base.config) * DTYPES[dtype].itemsize
        if (free := shutil.disk_usage(folder).free) < size:
            raise UserError(
                f"{out}: it takes {format_size(size)}, and {format_size(free)} are free: make room"
            )
        parameters = _write_weights(base, folder, DTYPES[dtype], shard_bytes)
        token_ids = write_tokenizer(base, folder)
        name = str(DTYPES[dtype]).removeprefix("torch.")
        _write_json(folder / CONFIG, huggingface_config(base.config, token_ids, name))
        _write_texts(folder, files)
        check = check_export(base, folder, DTYPES[dtype])
        write_origin(folder, origin)
        names = sorted(os.listdir(folder))
    return Exported(out, names, parameters, check)


def export_adapter(
    base: BaseModel,
    adapter: LoadedAdapter,
    out: Path,
    *,
    files: dict[str, str],
    origin: dict[str, str] | None = None,
    replace: bool = False,
) -> None:
    """Write an adapter without its base, in PEFT's format, with the tokenizer.

    Args:
        base: The adapter's base.
        adapter: The adapter.
        out: The directory. It appears when it is complete.
        files: Name -> content, of further files: README.md.
        origin: For an adapter that minigpt trained, more content of minigpt.json than the
            fingerprint of its base; see ``origin_text``.
        replace: Replace ``out`` if it exists and holds only what an export writes.

    Raises:
        UserError: ``out`` exists, lies in a run's checkpoints, or can't be written to.
    """
    if adapter.trained_on is not None:
        origin = {"base_sha256": adapter.trained_on, **(origin or {})}
    _refuse_in_checkpoints(out)
    if replace:
        _refuse_foreign_files(out)
    with whole_directory(out, replace) as folder:
        write_peft(adapter.shape, adapter.tensors, base.config, _name_for_peft(base), folder)
        write_tokenizer(base, folder)
        _write_texts(folder, files)
        write_origin(folder, origin)


def _refuse_foreign_files(out: Path) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise UserError(f"{out}: is not a directory that an export made: move it elsewhere")
    foreign = sorted(path.name for path in out.iterdir() if not EXPORTED.fullmatch(path.name))
    if foreign:
        raise UserError(f"{out} holds {foreign[0]}, which no export writes: move it elsewhere")


def _refuse_in_checkpoints(out: Path) -> None:
    out = Path(os.path.abspath(out))
    if any(_is_checkpoint_or_parent(each) for each in (out, *out.parents)):
        raise UserError(f"{out}: lies within a run's checkpoints; choose another directory")


def _is_checkpoint_or_parent(path: Path) -> bool:
    """Whether it is a checkpoint, or a run's directory of them; names alone don't decide."""
    if path.name == CHECKPOINTS:
        return (path.parent / RECIPE).exists() or bool(list_steps(path.parent))
    return is_checkpoint(path) and (path / STATE).exists()


def _name_for_peft(base: BaseModel) -> str:
    """Return from where PEFT can load the base; for a run its ``final/``, if that is the same."""
    if base.recipe is None:
        path = Path(base.name).expanduser()
        return os.path.abspath(path) if path.is_dir() else base.name
    final = base.directory.parent.parent / FINAL
    if (final / CONFIG).is_file() and weights_fingerprint(open_base(final)) == weights_fingerprint(
        base
    ):
        return os.path.abspath(final)
    return os.path.abspath(base.directory)


def _write_texts(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(base: BaseModel, folder: Path) -> dict[str, Any]:
    """Write the tokenizer and the auxiliary files; make the missing ones.

    Returns:
        The ids of special tokens for config.json.
    """
    tokenizer = load_tokenizer(base.tokenizer)
    token_ids = _special_token_ids(base, tokenizer)
    (folder / TOKENIZER).write_text(tokenizer.to_str(), encoding="utf-8")
    files = base.auxiliary_files.files
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if TOKENIZER_CONFIG not in files:
        end = tokenizer.id_to_token(eos_id(tokenizer))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "pad_token": end,
            "model_max_length": base.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
        _write_json(folder / TOKENIZER_CONFIG, settings)
    if GENERATION_CONFIG not in files:
        last = token_ids["eos_token_id"]
        padding = {"pad_token_id": last[0] if isinstance(last, list) else last}
        # Embeddings without a token, which pad the vocabulary, must not be generated.
        unused = list(range(vocabulary_size(tokenizer), base.config.vocab_size))
        suppressed = {"suppress_tokens": unused} if unused else {}
        _write_json(folder / GENERATION_CONFIG, padding | token_ids | suppressed)
    return token_ids


def _special_token_ids(base: BaseModel, tokenizer: "Tokenizer") -> dict[str, Any]:
    """Return the ids for config.json. In minigpt a text begins and ends with the same token."""
    end = eos_id(tokenizer)
    stop = sorted({end} | stop_token_ids(base, tokenizer))  # of a text, perhaps also of an answer
    return {
        "bos_token_id": end,
        "eos_token_id": stop if len(stop) > 1 else end,
        **base.auxiliary_files.special_token_ids,
    }


def _write_weights(base: BaseModel, folder: Path, dtype: torch.dtype, shard_bytes: int) -> int:
    """Write the safetensors files, with an index if there are several; return the parameters."""
    files: list[dict[str, list[int]]] = [{}]  # for each file: our name -> shape as it is stored
    size, width = 0, dtype.itemsize
    for name, parameter in meta_model(base.config).named_parameters():
        if files[-1] and size + parameter.numel() * width > shard_bytes:
            files.append({})
            size = 0
        shape = list(parameter.shape)
        files[-1][name] = shape[::-1] if is_transposed(base.config, name) else shape
        size += parameter.numel() * width
    total = parameter_count(base.config)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(files, 1):
        suffix = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        name = f"model{suffix}.safetensors"
        stored = {huggingface_name(base.config, ours): shape for ours, shape in shapes.items()}
        write_safetensors(folder / name, stored, dtype, _read(base, shapes, dtype))
        weight_map |= dict.fromkeys(stored, name)
    if len(files) > 1:
        metadata = {"total_parameters": total, "total_size": total * width}
        _write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})
    return total


def _read(base: BaseModel, names: Iterable[str], dtype: torch.dtype) -> Iterator[Tensor]:
    """Read parameters, in transformers' layout."""
    for name in names:
        tensor = base.read(name).to(dtype)
        if not tensor.isfinite().all():
            raise UserError(f"{name} holds numbers too large for {dtype}: export it as bf16")
        yield tensor.T if is_transposed(base.config, name) else tensor


def write_safetensors(
    file: Path, shapes: dict[str, list[int]], dtype: torch.dtype, tensors: Iterable[Tensor]
) -> None:
    """Write a safetensors file tensor by tensor; the library's writer needs all in memory.

    The format is 8 bytes of header length, a JSON header, and the numbers.

    Args:
        file: The file to write.
        shapes: Name -> shape, in the order of ``tensors``.
        dtype: Of all tensors.
        tensors: An iterator, so that only one tensor is in memory.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    stored, end = _SAFETENSORS_DTYPES[dtype], 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": stored, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the numbers
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert list(tensor.shape) == shape, (tensor.shape, shape)
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
