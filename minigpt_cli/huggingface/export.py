"""A Hugging Face directory from a trained model: written one tensor at a time, then proven by
reloading it with transformers. Only what is proven gets its name.
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

from minigpt_cli.core.errors import UserError
from minigpt_cli.data.tokenizer import eos_id, load_tokenizer
from minigpt_cli.huggingface.base_model import Base, ends, open_base, weights_fingerprint
from minigpt_cli.huggingface.check_export import ExportCheck, check_export
from minigpt_cli.huggingface.directory import directory_in_place
from minigpt_cli.huggingface.peft import ORIGIN, LoadedAdapter, write_adapter
from minigpt_cli.huggingface.weights import CONFIG, INDEX
from minigpt_cli.model.cost import parameter_count
from minigpt_cli.model.gpt import GPT
from minigpt_cli.model.hf_names import huggingface_config, huggingface_name, is_transposed

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FINAL = "final"  # in a run directory: its export
SHARD_BYTES = 5_000_000_000
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_STORED = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Exported:
    path: Path
    files: list[str]
    parameters: int
    proof: ExportCheck


def export_model(
    base: Base,
    out: Path,
    dtype: str = "fp32",
    *,
    files: dict[str, str],
    replace: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Exported:
    """Write ``base`` as a directory that transformers reads.

    Args:
        dtype: of the weights: fp32, bf16 or fp16.
        files: name -> content, of what stands beside it: README.md ...
        replace: put it in the place of what ``out`` holds.
        shard_bytes: a file of weights holds no more, unless one tensor does.

    Raises:
        UserError: ``out`` is there already, or can't be written to.
        Mismatch: transformers computes something else from it; ``out`` is as it was.
    """
    with directory_in_place(out, replace) as folder:
        size = parameter_count(base.config) * DTYPES[dtype].itemsize
        if (free := shutil.disk_usage(folder).free) < size:
            raise UserError(f"{out}: it takes {size / 1e9:.1f} GB, and {free / 1e9:.1f} are free")
        parameters = _write_weights(base, folder, DTYPES[dtype], shard_bytes)
        tokens = write_tokenizer(base, folder)
        name = str(DTYPES[dtype]).removeprefix("torch.")
        _write_json(folder / CONFIG, huggingface_config(base.config, tokens, name))
        _write_texts(folder, files)
        proof = check_export(base, folder, DTYPES[dtype])
        names = sorted(os.listdir(folder))
    return Exported(out, names, parameters, proof)


def export_adapter(
    base: Base,
    adapter: LoadedAdapter,
    out: Path,
    *,
    files: dict[str, str],
    provenance: dict[str, str] | None = None,
    replace: bool = False,
) -> None:
    """Write an adapter alone, in PEFT's format, with the tokenizer; see ``export_model``.

    Args:
        provenance: what its ``ORIGIN`` is to tell besides what the base was.
    """
    with directory_in_place(out, replace) as folder:
        write_adapter(adapter, base.config, _name_for_peft(base), folder)
        write_tokenizer(base, folder)
        origin = {"base_sha256": adapter.trained_on} if adapter.trained_on is not None else {}
        _write_json(folder / ORIGIN, origin | (provenance or {}))
        _write_texts(folder, files)


def _name_for_peft(base: Base) -> str:
    """What PEFT can load the base from: of a run, its ``final/``, if that is the same model."""
    if base.recipe is None:
        path = Path(base.name).expanduser()
        return os.path.abspath(path) if path.is_dir() else base.name
    final = base.directory.parent.parent / FINAL
    if (final / CONFIG).is_file() and weights_fingerprint(open_base(final)) == weights_fingerprint(
        base
    ):
        return str(final)
    return str(base.directory)


def _write_texts(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _special_tokens(base: Base, tokenizer: "Tokenizer") -> dict[str, Any]:
    """The ids that config.json names. A text of minigpt's begins and ends with the same token."""
    end = eos_id(tokenizer)
    last = sorted({end} | ends(base, tokenizer))  # of a text, and of an answer if that is another
    return {
        "bos_token_id": end,
        "eos_token_id": last if len(last) > 1 else end,
        **base.auxiliary_files.special_tokens,
    }


def write_tokenizer(base: Base, folder: Path) -> dict[str, Any]:
    """The tokenizer's files, and what else came with the base; returns the ids of special tokens
    that config.json names."""
    tokenizer = load_tokenizer(base.tokenizer)
    tokens = _special_tokens(base, tokenizer)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    for name, text in base.auxiliary_files.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    if "tokenizer_config.json" not in base.auxiliary_files.files:
        end = tokenizer.id_to_token(eos_id(tokenizer))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
            "pad_token": end,
            "model_max_length": base.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
        _write_json(folder / "tokenizer_config.json", settings)
    if "generation_config.json" not in base.auxiliary_files.files:
        last = tokens["eos_token_id"]
        padding = {"pad_token_id": last[0] if isinstance(last, list) else last}
        _write_json(folder / "generation_config.json", padding | tokens)
    return tokens


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(base: Base, folder: Path, dtype: torch.dtype, shard_bytes: int) -> int:
    """Write the safetensors files, and their index where they are several; returns the number of
    parameters."""
    with torch.device("meta"):
        wanted = dict(GPT(base.config).named_parameters())
    files: list[dict[str, list[int]]] = [{}]  # of each file: our name -> shape as it is stored
    size, width = 0, dtype.itemsize
    for name, parameter in wanted.items():
        if files[-1] and size + parameter.numel() * width > shard_bytes:
            files.append({})
            size = 0
        shape = list(parameter.shape)
        files[-1][name] = shape[::-1] if is_transposed(base.config, name) else shape
        size += parameter.numel() * width
    total = parameter_count(base.config)
    places: dict[str, str] = {}
    for number, shapes in enumerate(files, 1):
        several = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        name = f"model{several}.safetensors"
        stored = {huggingface_name(base.config, ours): shape for ours, shape in shapes.items()}
        write_safetensors(folder / name, stored, dtype, _read(base, shapes, dtype))
        places |= dict.fromkeys(stored, name)
    if len(files) > 1:
        metadata = {"total_parameters": total, "total_size": total * width}
        _write_json(folder / INDEX, {"metadata": metadata, "weight_map": places})
    return total


def _read(base: Base, names: Iterable[str], dtype: torch.dtype) -> Iterator[Tensor]:
    """The parameters in transformers' layout."""
    for name in names:
        tensor = base.read(name).to(dtype)
        if not tensor.isfinite().all():
            raise UserError(f"{name} holds numbers too large for {dtype}: export it as bf16")
        yield tensor.T if is_transposed(base.config, name) else tensor


def write_safetensors(
    file: Path, shapes: dict[str, list[int]], dtype: torch.dtype, tensors: Iterable[Tensor]
) -> None:
    """Write a safetensors file (8 bytes of length, a JSON header, the numbers) while the tensors
    come; the library's own writer wants all of them in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _STORED[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for shape, tensor in zip(shapes.values(), tensors, strict=True):
            assert list(tensor.shape) == shape, (tensor.shape, shape)
            stream.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
