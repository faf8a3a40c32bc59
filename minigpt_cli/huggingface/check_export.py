"""Check an export: transformers must load it, and compute the same logits and tokens."""

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.core.memory import available_memory
from minigpt_cli.data.tokenizer import load_tokenizer
from minigpt_cli.huggingface.base_model import BaseModel, load_base
from minigpt_cli.model.cost import parameter_count
from minigpt_cli.model.gpt import GPT, copy_values

_TOLERANCE = 1e-4  # of float32 logits; relative to the largest logit if that is above 1
_MAX_TOKENS = 512
# Scripts, white space, numbers and code: tokenizers often differ in these.
TEXT = """\
The proof of the pudding is in the eating; 3.14159 is not quite 22/7, and 1,000,000 has 6 zeros.
« Où est la bibliothèque ? » demanda-t-elle. Straße, naïve, smörgåsbord, İstanbul, Ελλάδα, Москва.
東京は日本の首都です。 人工智能改变世界。 안녕하세요! مرحبا بالعالم नमस्ते दुनिया 🙂🚀👩‍👩‍👧 e\u0301
def fibonacci(n: int) -> int:
\treturn n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)   # O(2**n)


    "quoted", 'single', <tag attr="x"/>, C:\\path, user@example.com, https://example.com/?q=1&r=2
"""


class Mismatch(UserError):
    """transformers reads another model from an export: a bug in minigpt."""

    exit_code = 1


@dataclass(frozen=True)
class ExportCheck:
    """The result of the check.

    Attributes:
        difference: The largest absolute difference of any logit; None if it was not checked.
        skipped: Why it was not checked.
    """

    difference: float | None
    skipped: str = ""

    def __str__(self) -> str:
        if self.difference is None:
            return f"not checked: {self.skipped}"
        return f"checked with transformers: logits differ by at most {self.difference:.1e}"


def check_export(base: BaseModel, folder: Path, dtype: torch.dtype) -> ExportCheck:
    """Compare the logits and the tokens of a text between transformers and minigpt.

    It is skipped if transformers is missing or too old, or if there is too little memory.

    Args:
        base: The model that was exported.
        folder: The export.
        dtype: Of the exported weights.

    Raises:
        Mismatch: They differ, or transformers can't load the export.
    """
    try:
        import transformers
    except ImportError:
        return ExportCheck(None, "transformers is not installed")
    if base.config.family not in transformers.CONFIG_MAPPING:
        version = transformers.__version__
        return ExportCheck(None, f"transformers {version} is too old to know {base.config.family}")
    parameters = parameter_count(base.config)
    free = available_memory()
    if free is not None and free < 2 * 4 * parameters:
        return ExportCheck(None, f"it needs {8 * parameters / 1e9:.1f} GB of memory")
    tokenizer = load_tokenizer(base.tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    inputs = torch.tensor([ids[: min(_MAX_TOKENS, base.config.max_position_embeddings)]])
    ours = _our_logits(base, inputs, dtype)
    gc.collect()
    try:
        with _quiet(transformers):
            _compare_tokenizers(
                transformers, folder, ids, tokenizer.decode(ids, skip_special_tokens=False)
            )
            theirs = _their_logits(transformers, folder, inputs)
    except (Mismatch, MemoryError):
        raise
    except Exception as error:  # of any type: all of transformers runs here
        raise Mismatch(
            f"transformers can't load the export: {first_line(error)}; nothing was written"
        ) from error
    difference = (ours - theirs).abs().max().item()
    limit = _TOLERANCE * max(1.0, ours.abs().max().item())
    if not difference <= limit:
        raise Mismatch(
            f"transformers computes other logits from the export: they differ by {difference:.2g}, "
            f"rounding explains at most {limit:.2g}; nothing was written"
        )
    return ExportCheck(difference)


@torch.no_grad()
def _our_logits(base: BaseModel, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    model = GPT(base.config)
    load_base(base, model, lambda parameter, values: copy_values(parameter, values.to(dtype)))
    logits: Tensor = model.eval()(inputs)
    return logits


@torch.no_grad()
def _their_logits(transformers: Any, folder: Path, inputs: Tensor) -> Tensor:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, trust_remote_code=False
    )
    wrong = {kind: names for kind, names in report.items() if names and "keys" in kind}
    if wrong:
        raise Mismatch(f"transformers finds other tensors in the export: {wrong}")
    logits: Tensor = model.float().eval()(inputs).logits
    return logits


def _compare_tokenizers(transformers: Any, folder: Path, ids: list[int], text: str) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    if theirs(TEXT, add_special_tokens=False)["input_ids"] != ids:
        raise Mismatch("transformers encodes a text to other tokens than the run's tokenizer")
    if theirs.decode(ids, clean_up_tokenization_spaces=False) != text:
        raise Mismatch("transformers decodes tokens to another text than the run's tokenizer")


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence progress bars and warnings."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
