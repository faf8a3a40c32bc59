"""A trained model for ``eval``, ``sample`` and ``export``: which device, and what is reported."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from minigpt_cli.checkpoint.store import list_steps
from minigpt_cli.commands.options import Dtype
from minigpt_cli.core.console import log, warn
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.run_dir import run_of
from minigpt_cli.distributed.device import find_device
from minigpt_cli.huggingface.adapter import LoadedAdapter, apply
from minigpt_cli.huggingface.base_model import BaseModel
from minigpt_cli.huggingface.load import TrainedModel, load_model
from minigpt_cli.model.precision import compute_dtype, weights_dtype
from minigpt_cli.recipe import PrecisionSettings

T = TypeVar("T")
_ATTEMPTS = 20


def load_and_report(path: Path, adapters: list[Path] | None, device: str | None) -> TrainedModel:
    """Load a model with its first adapter onto a device, and say which checkpoint it is."""
    chosen, others = choose_device(device), adapters or []
    trained = retry_if_pruned([path, *others], lambda: load_model(path, chosen, others))
    report_base(trained.base)
    return trained


def retry_if_pruned(paths: list[Path], read: Callable[[], T]) -> T:
    """Read models of runs that may be training: a run deletes old checkpoints, also under a reader.

    Args:
        paths: The models, of which some may be runs.
        read: Reads them. It is called again if it fails and a checkpoint has gone meanwhile.

    Returns:
        What ``read`` returns.
    """
    for attempt in range(_ATTEMPTS):
        before = [each for path in paths for _, each in list_steps(run_of(path))]
        try:
            return read()
        except Exception:
            if attempt == _ATTEMPTS - 1 or all(each.exists() for each in before):
                raise
    raise AssertionError


def choose_device(name: str | None) -> torch.device:
    """Return the device that ``--device`` names; by default a GPU if there is one.

    Raises:
        UserError: this machine has no such device.
    """
    if name is None:
        return find_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; give cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return device
    gpus = torch.cuda.device_count()
    if device.type != "cuda" or (device.index or 0) >= gpus:
        raise UserError(f"--device {name}: this machine has {gpus} CUDA GPUs; leave out --device")
    torch.cuda.set_device(device)
    return device


def report_base(base: BaseModel) -> None:
    """Say which checkpoint was loaded, and warn about newer ones that are damaged."""
    for problem in base.skipped_checkpoints:
        warn(problem)
    log(base.report)


def each_adapter(trained: TrainedModel) -> Iterator[LoadedAdapter | None]:
    """Yield the adapters one after another, each in use; one None if there are none."""
    if not trained.adapters:
        yield None
    for adapter in trained.adapters:
        if len(trained.adapters) > 1:
            apply(trained.model, adapter)
            trained.model.eval()
            log(f"adapter {adapter.name}")
        yield adapter


def set_dtype(trained: TrainedModel, name: Dtype) -> torch.dtype:
    """Return the dtype of matrix products; a dtype that the user named also sets the weights'."""
    device = next(trained.model.parameters()).device
    if name == "auto":
        recipe = trained.recipe
        return compute_dtype(PrecisionSettings() if recipe is None else recipe.precision, device)
    try:
        dtype = compute_dtype(PrecisionSettings(dtype=name), device)
    except UserError:
        raise UserError(
            f"--dtype {name}: the device has no {name}; use --dtype fp16 or fp32"
        ) from None
    trained.model.to(weights_dtype(dtype))
    return dtype
