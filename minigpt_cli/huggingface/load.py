"""A trained model on a device, for everything but training."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minigpt_cli.checkpoint import store
from minigpt_cli.core.errors import UserError
from minigpt_cli.data.tokenizer import load_tokenizer
from minigpt_cli.huggingface.base_model import Base, load_base
from minigpt_cli.huggingface.peft import LoadedAdapter, apply, open_model
from minigpt_cli.model.gpt import GPT, copy_values
from minigpt_cli.recipe import Recipe

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class TrainedModel:
    model: GPT
    tokenizer: "Tokenizer"
    base: Base
    adapters: list[LoadedAdapter]  # the first of them is beside the model's layers

    @property
    def checkpoint(self) -> Path:
        """What was trained last: the base's directory, or that of an adapter's checkpoint."""
        adapter = self.adapters[0] if self.adapters else None
        return (adapter and adapter.checkpoint) or self.base.directory

    @property
    def recipe(self) -> Recipe | None:
        """Of the run that trained it last."""
        adapter = self.adapters[0] if self.adapters else None
        return (adapter.recipe if adapter is not None else None) or self.base.recipe


def load_model(path: Path, device: torch.device, adapters: list[Path]) -> TrainedModel:
    """A model in evaluation mode, with the first of its adapters; see ``open_model``."""
    base, opened = open_model(path, adapters)
    fp64 = base.recipe is not None and base.recipe.precision.dtype == "fp64"
    model = GPT(base.config).to(device, torch.float64 if fp64 else torch.float32)
    load_base(base, model, copy_values)
    apply(model, opened[0] if opened else None)
    model.eval()
    return TrainedModel(model, load_tokenizer(base.tokenizer), base, opened)


def newest_run(runs: Path = Path("runs")) -> Path:
    """The run under ``runs`` that saved a checkpoint last.

    Raises:
        UserError: none has.
    """
    newest = [
        (steps[-1][1].stat().st_mtime, directory)
        for directory in (sorted(runs.iterdir()) if runs.is_dir() else [])
        if (steps := store.list_steps(directory))
    ]
    if not newest:
        raise UserError(f"{runs}/ holds no trained run: name a run directory or a checkpoint")
    return max(newest)[1]
