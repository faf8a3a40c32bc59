"""The proof that an export is what was trained: transformers reloads it and computes the same."""

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.data.tokenizer import load_tokenizer
from minigpt_cli.distributed.device import available_memory
from minigpt_cli.huggingface.base_model import Base, load_base
from minigpt_cli.model.cost import parameter_count
from minigpt_cli.model.gpt import GPT, copy

TOLERANCE = 1e-4  # of float32 logits, or of the largest of them where that is above 1
_TOKENS = 512
# Several scripts, white space, numbers, code: what tokenizers are apt to differ about.
TEXT = """\
The proof of the pudding is in the eating; 3.14159 is not quite 22/7, and 1,000,000 has 6 zeros.
« Où est la bibliothèque ? » demanda-t-elle. Straße, naïve, smörgåsbord, İstanbul, Ελλάδα, Москва.
東京は日本の首都です。 人工智能改变世界。 안녕하세요! مرحبا بالعالم नमस्ते दुनिया 🙂🚀👩‍👩‍👧 e\u0301
def fibonacci(n: int) -> int:
\treturn n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)   # O(2**n)


    "quoted", 'single', <tag attr="x"/>, C:\\path, user@example.com, https://example.com/?q=1&r=2
"""


class Mismatch(UserError):
    """An export that transformers reads as another model: a bug of ours."""

    exit_code = 1


@dataclass(frozen=True)
class ExportCheck:
    difference: float | None  # the largest of any logit
    skipped: str = ""  # why there is none

    def __str__(self) -> str:
        if self.difference is None:
            return f"not proven: {self.skipped}"
        return f"proven by transformers: logits differ by {self.difference:.1e} at most"


def check_export(base: Base, folder: Path, dtype: torch.dtype) -> ExportCheck:
    """Compare what transformers makes of ``folder`` with ``base``: logits, and tokens of a text.

    Args:
        dtype: what the weights were rounded to.

    Raises:
        Mismatch: they differ.
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
        return ExportCheck(None, f"it takes {8 * parameters / 1e9:.1f} GB of memory")
    tokenizer = load_tokenizer(base.tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    inputs = torch.tensor([ids[: min(_TOKENS, base.config.max_position_embeddings)]])
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
    except Exception as error:  # of any kind: it is all of transformers that runs here
        raise Mismatch(
            f"transformers can't load the export: {first_line(error)}; nothing was written"
        ) from error
    difference = (ours - theirs).abs().max().item()
    limit = TOLERANCE * max(1.0, ours.abs().max().item())
    if not difference <= limit:
        raise Mismatch(
            f"transformers computes other logits from the export: they differ by {difference:.2g}, "
            f"and {limit:.2g} is rounding; nothing was written"
        )
    return ExportCheck(difference)


@torch.no_grad()
def _our_logits(base: Base, inputs: Tensor, dtype: torch.dtype) -> Tensor:
    model = GPT(base.config)
    load_base(base, model, lambda parameter, values: copy(parameter, values.to(dtype)))
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
        raise Mismatch("transformers makes other tokens of a text than the tokenizer trained on")
    if theirs.decode(ids, clean_up_tokenization_spaces=False) != text:
        raise Mismatch("transformers makes another text of tokens than the tokenizer trained on")


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars and no warnings: what matters is compared."""
    logging = transformers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
