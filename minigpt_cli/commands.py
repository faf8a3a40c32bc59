"""What the commands beside training do: put a model, data and a device together."""

import json
from pathlib import Path
from typing import Any

import torch

from minigpt_cli.core.console import log, warn
from minigpt_cli.core.errors import UserError
from minigpt_cli.data.chat import render
from minigpt_cli.data.sequences import open_eval_sequences
from minigpt_cli.data.tokenizer import eos_id, token_byte_lengths, tokenizer_fingerprint
from minigpt_cli.distributed.device import find_device
from minigpt_cli.evaluate.loss import evaluate, stream_batches
from minigpt_cli.generate.sampling import SamplingOptions
from minigpt_cli.generate.text import TextChunk, complete, stream_text
from minigpt_cli.huggingface.base_model import Base, chat_template, ends
from minigpt_cli.huggingface.card import model_card
from minigpt_cli.huggingface.export import export_adapter, export_model
from minigpt_cli.huggingface.load import TrainedModel, load_model, newest_run
from minigpt_cli.huggingface.peft import (
    ORIGIN,
    LoadedAdapter,
    apply,
    is_ours,
    merge,
    open_model,
    origin_of,
)
from minigpt_cli.model import precision
from minigpt_cli.recipe import PrecisionSettings

LONGEST = 1024  # tokens of a window, where no recipe says how many


def evaluate_model(
    path: Path,
    adapter: Path | None,
    data: Path | None,
    split: str,
    text: Path | None,
    batch_size: int,
) -> dict[str, Any]:
    """Loss over every token of a dataset's split, or of a text file."""
    trained = _load(path, [adapter] if adapter is not None else [])
    lengths = token_byte_lengths(trained.tokenizer)
    positions, recipe = trained.model.config.max_position_embeddings, trained.recipe
    length = min(LONGEST, positions) if recipe is None else recipe.train.sequence_length
    if text is not None:
        if data is not None:
            raise UserError("give --data or --text, not both")
        content = _read_text(text)
        ids = trained.tokenizer.encode(content, add_special_tokens=False).ids
        # As every document in training does, the text follows an end of text: so its first token
        # is predicted too.
        stream = torch.tensor([eos_id(trained.tokenizer), *ids]).numpy()
        tokens, bytes_per_token = len(stream), len(content.encode()) / max(1, len(ids))
        batches = stream_batches(lambda a, b: stream[a:b], tokens, length, batch_size)
        if tokens < 2:
            raise UserError(f"{text}: holds no text to evaluate on")
    else:
        if data is None and recipe is None:
            raise UserError(f"{path}: what to evaluate on? give --data or --text")
        folder = data if data is not None else Path(recipe.data_path if recipe else "")
        found = open_eval_sequences(folder, split, length, tokenizer_fingerprint(trained.tokenizer))
        batches, bytes_per_token = found.batches(batch_size), found.bytes_per_token
    device = next(trained.model.parameters()).device
    result = evaluate(
        trained.model,
        batches,
        dtype=precision.compute_dtype(recipe.precision if recipe else PrecisionSettings(), device),
        token_bytes=lengths,
        bytes_per_token=bytes_per_token,
    )
    assert result is not None
    return {
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "checkpoint": str(trained.checkpoint),
    }


def sample_model(
    path: Path | None,
    adapters: list[Path],
    prompt: str,
    chat: bool,
    options: SamplingOptions,
    *,
    max_new_tokens: int,
    num_samples: int,
    stop: list[str],
    seed: int,
    dtype: str,
    stream: bool,
) -> dict[str, Any]:
    """Continue a prompt; with ``stream``, print the text as it comes."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt is not valid UTF-8 text") from None
    trained = _load(path or newest_run(), adapters)
    device = next(trained.model.parameters()).device
    if dtype == "bf16" or (dtype == "auto" and device.type == "cuda"):
        trained.model.to(torch.bfloat16)
    prompt_ids = (_chat_ids if chat else _text_ids)(trained, prompt)
    results = []
    chosen: list[LoadedAdapter | None] = [*trained.adapters] or [None]
    for adapter in chosen:
        if adapter is not None and len(trained.adapters) > 1:
            apply(trained.model, adapter)
            trained.model.eval()
            log(f"adapter {adapter.name}")
        pieces = stream_text(
            trained.model,
            trained.tokenizer,
            prompt_ids,
            options,
            max_new_tokens=max_new_tokens,
            num_samples=num_samples,
            seed=seed,
            eos_id=eos_id(trained.tokenizer),
            stop_token_ids=ends(trained.base, trained.tokenizer),
            stop=stop,
        )
        if stream:
            pieces = _printed(list(range(num_samples)), "" if chat else prompt, iter(pieces))
        completions = complete(pieces)
        results.append(
            {
                "prompt": prompt,
                "completions": [completion.text for completion in completions],
                "finish_reasons": [completion.finish_reason for completion in completions],
                "checkpoint": str((adapter and adapter.checkpoint) or trained.base.directory),
                **({"adapter": adapter.name} if adapter is not None else {}),
            }
        )
    return results[0] if len(results) == 1 else {"prompt": prompt, "adapters": results}


def _text_ids(trained: TrainedModel, prompt: str, special: bool | None = None) -> list[int]:
    """A prompt's tokens. What others trained expects the special tokens that its tokenizer adds, a
    Llama's begin of text; minigpt trains without them.

    Args:
        special: whether they are added.
    """
    if special is None:
        special = not is_ours(trained.base, trained.adapters[0] if trained.adapters else None)
    ids: list[int] = trained.tokenizer.encode(prompt, add_special_tokens=special).ids
    return ids


def _chat_ids(trained: TrainedModel, prompt: str) -> list[int]:
    """The prompt as a user's message, up to where the assistant begins."""
    base = trained.base
    template, variables = chat_template(base.tokenizer, base.auxiliary_files)
    if template is None:
        raise UserError(f"{base.name}: has no chat template; leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    text = render(template, messages, add_generation_prompt=True, variables=variables)
    trained.tokenizer.encode_special_tokens = False
    return _text_ids(trained, text, special=False)  # the template has them


def export(
    path: Path, out: Path, dtype: str, adapter_path: Path | None, adapter_only: bool
) -> dict[str, Any]:
    """Write a Hugging Face directory: of a model, of one with an adapter merged into it, or of the
    adapter alone, in PEFT's format."""
    base, adapters = open_model(path, [adapter_path] if adapter_path is not None else [])
    adapter = adapters[0] if adapters else None
    _tell_of(base)
    files = {"README.md": model_card(base, path.resolve().name, adapter, alone=adapter_only)}
    if adapter_only:
        if dtype != "fp32":
            raise UserError("--dtype is for whole models; an adapter is stored as it was trained")
        if adapter is None:
            raise UserError(f"{path}: is a whole model, so there is no adapter to export")
        export_adapter(base, adapter, out, files=files)
        log(f"{out}: an adapter of rank {adapter.shape.rank}, in PEFT's format")
        return {"path": str(out), "files": sorted(file.name for file in out.iterdir())}
    if is_ours(base, adapter):
        files[ORIGIN] = json.dumps(origin_of(base, adapter)) + "\n"
    exported = export_model(merge(base, adapter) if adapter else base, out, dtype, files=files)
    log(f"{exported.path}: {exported.parameters:,} parameters, {exported.proof}")
    return {
        "path": str(exported.path),
        "files": exported.files,
        "parameters": exported.parameters,
        "proven": exported.proof.difference is not None,
        "max_logit_difference": exported.proof.difference,
    }


def _printed(samples: list[int], prompt: str, pieces: Any) -> Any:
    """Pass the pieces on, printing them: the first sample live, each further one once those before
    it are complete."""
    waiting: dict[int, list[str]] = {sample: [] for sample in samples}
    ended: set[int] = set()
    current = 0
    print(prompt, end="", flush=True)
    piece: TextChunk
    for piece in pieces:
        yield piece
        waiting[piece.sample].append(piece.text)
        if piece.finish_reason is not None:
            ended.add(piece.sample)
        while current < len(samples):
            print("".join(waiting[current]), end="", flush=True)
            waiting[current] = []
            if current not in ended:
                break
            current += 1
            print(flush=True)
            if current < len(samples):
                print(f"\n--- {current + 1} ---\n{prompt}", end="", flush=True)


def _load(path: Path, adapters: list[Path]) -> TrainedModel:
    trained = load_model(path, find_device(), adapters)
    _tell_of(trained.base)
    return trained


def _tell_of(base: Base) -> None:
    for problem in base.skipped_checkpoints:
        warn(problem)
    log(base.report)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text: {error}") from None
