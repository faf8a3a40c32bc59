"""What is saved: every tensor of a run by name, and the few numbers beside them.

Tensors go through torch.distributed.checkpoint into safetensors, so that the engine reshards them;
everything else is ``state.json``. Nothing is pickled.
"""

import json
import logging
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from minigpt_cli.errors import Damaged, UserError

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
WEIGHTS, OPTIMIZER = "weights.", "optimizer."  # prefixes of the tensors' names
STATE_FILE = "state.json"

# The engine tells a single process, at every save and load, that it is a single process.
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)


@dataclass
class RunState:
    """Where a run stands; with the tensors, all that the next step depends on."""

    step: int = 0  # updates made, so also the place in the data
    tokens: int = 0  # tokens trained on
    evaluated_step: int = 0  # the step of the last evaluation
    val_loss: float | None = None  # at that step
    best_val_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    skipped: int = 0  # fp16 updates skipped
    scaler: dict[str, Any] = field(default_factory=dict)
    dataset: dict[str, Any] = field(default_factory=dict)  # fingerprints of what it trains on


def tensors_of(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Weights and optimizer state by parameter name: the tensors themselves, not copies."""
    weights = get_model_state_dict(model, options=_OPTIONS)
    moments = _optimizer_state(model, optimizers)
    return {WEIGHTS + name: tensor for name, tensor in weights.items()} | {
        OPTIMIZER + name: value for name, value in moments.items() if isinstance(value, Tensor)
    }


def _optimizer_state(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return get_optimizer_state_dict(model, optimizers, options=_OPTIONS)


def write_tensors(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Write safetensors files: the weights in the first, the optimizer's state in the second."""
    files = {name: 1 if name.startswith(WEIGHTS) else 2 for name in tensors}
    writer = HuggingFaceStorageWriter(str(directory), files, save_distributed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.save(tensors, storage_writer=writer, no_dist=True)


def read_tensors(directory: Path, tensors: dict[str, Tensor], recorded: dict[str, Any]) -> None:
    """Fill ``tensors`` in place from a checkpoint.

    The engine casts silently and leaves out silently, so names, shapes and dtypes are compared
    with ``recorded`` (the manifest's list) first.

    Raises:
        UserError: the checkpoint doesn't hold exactly what is wanted.
    """
    for name, tensor in tensors.items():
        wanted = describe(tensor)
        if recorded.get(name) != wanted:
            raise UserError(
                f"{directory}: {name} should be {wanted['dtype']} {wanted['shape']}, but the "
                f"checkpoint holds {recorded.get(name) or 'no such tensor'}: "
                "it belongs to another model, optimizer or precision"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        reader = HuggingFaceStorageReader(str(directory))
        dcp.load(tensors, storage_reader=reader, no_dist=True)


def describe(tensor: Tensor) -> dict[str, Any]:
    """The manifest's entry for a tensor."""
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}


def load_tensors(
    directory: Path,
    recorded: dict[str, Any],
    model: nn.Module,
    optimizers: list[torch.optim.Optimizer],
) -> None:
    """Fill a model and its optimizers from a verified checkpoint."""
    moments = _optimizer_state(model, optimizers)  # makes the optimizers' state, to be overwritten
    weights = get_model_state_dict(model, options=_OPTIONS)
    wanted = {WEIGHTS + name: tensor for name, tensor in weights.items()}
    wanted |= {OPTIMIZER + name: v for name, v in moments.items() if isinstance(v, Tensor)}
    if extra := sorted(recorded.keys() - wanted.keys()):
        raise UserError(
            f"{directory}: holds {extra[0]} and {len(extra) - 1} more tensors that this model and "
            "optimizer don't have: it belongs to another recipe"
        )
    read_tensors(directory, wanted, recorded)
    model.load_state_dict(weights)
    set_optimizer_state_dict(model, optimizers, moments, options=_OPTIONS)


def load_weights(directory: Path, recorded: dict[str, Any], model: nn.Module) -> None:
    """Fill a model alone from a verified checkpoint."""
    weights = get_model_state_dict(model, options=_OPTIONS)
    read_tensors(directory, {WEIGHTS + name: t for name, t in weights.items()}, recorded)
    model.load_state_dict(weights)


def write_state(directory: Path, state: RunState) -> None:
    (directory / STATE_FILE).write_text(json.dumps(asdict(state), indent=2) + "\n")


def read_state(directory: Path) -> RunState:
    try:
        return RunState(**json.loads((directory / STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise Damaged(f"{directory / STATE_FILE}: can't be read: {error}") from None
