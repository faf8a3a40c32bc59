"""Load a trained model onto a device, to evaluate it or to generate text."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minigpt_cli.checkpoint.store import list_steps
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.threads import device_thread
from minigpt_cli.data.tokenizer import load_tokenizer, vocabulary_size
from minigpt_cli.huggingface.adapter import LoadedAdapter, apply, open_model
from minigpt_cli.huggingface.base_model import BaseModel, load_base
from minigpt_cli.model.gpt import GPT, copy_values
from minigpt_cli.recipe import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class TrainedModel:
    """A model in evaluation mode.

    Attributes:
        model: With the first of the adapters.
        tokenizer: The model's.
        base: The model without adapters.
        adapters: All that were opened; see ``apply``.
    """

    model: GPT
    tokenizer: "Tokenizer"
    base: BaseModel
    adapters: list[LoadedAdapter]

    def checkpoint_of(self, adapter: LoadedAdapter | None) -> Path:
        """Return the adapter's checkpoint if it has one, else the base's directory."""
        return (adapter and adapter.checkpoint) or self.base.directory

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the run that trained it last; None for a Hugging Face model."""
        adapter = self.adapters[0] if self.adapters else None
        return (adapter.recipe if adapter is not None else None) or self.base.recipe


def load_model(path: Path, device: torch.device, adapters: list[Path]) -> TrainedModel:
    """Load a model in evaluation mode, with the first of its adapters.

    Args:
        path: See ``open_model``.
        device: Where the weights go. They are float32, or float64 if the run trained in it.
        adapters: See ``open_model``.

    Raises:
        UserError: There is no such model, or an adapter belongs to another one.
        Damaged: A run has no valid checkpoint.
    """
    base, opened = open_model(path, adapters)
    with device_thread("tokenizer", device) as pool:  # large tokenizers take as long as weights
        tokenizer = pool.submit(load_tokenizer, base.tokenizer)
        fp64 = base.recipe is not None and base.recipe.precision.dtype == "fp64"
        model = GPT(base.config).to(device, torch.float64 if fp64 else torch.float32)
        load_base(base, model, copy_values)
        apply(model, opened[0] if opened else None)
        model.eval()
        _check_vocabulary(base, tokenizer.result())
        return TrainedModel(model, tokenizer.result(), base, opened)


def _check_vocabulary(base: BaseModel, tokenizer: "Tokenizer") -> None:
    """Refuse a tokenizer with ids for which the model has no embeddings."""
    if (size := vocabulary_size(tokenizer)) > base.config.vocab_size:
        raise UserError(
            f"{base.tokenizer}: has token ids up to {size - 1:,}, but the model has "
            f"{base.config.vocab_size:,} embeddings: is this the tokenizer it was trained with?"
        )


def newest_run(runs: Path = Path("runs")) -> Path:
    """Return the run directory in ``runs`` with the newest checkpoint.

    Raises:
        UserError: No run has a checkpoint.
    """
    newest = [
        (steps[-1][1].stat().st_mtime, directory)
        for directory in (sorted(runs.iterdir()) if runs.is_dir() else [])
        if (steps := list_steps(directory))
    ]
    if not newest:
        raise UserError(f"{runs}/ holds no trained run: name a run directory or a checkpoint")
    return max(newest)[1]
