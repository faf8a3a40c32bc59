"""A trained model for ``eval``, ``sample`` and ``export``: which device, and what is reported."""

from collections.abc import Iterator
from pathlib import Path

import torch

from minigpt_cli.core.console import log, warn
from minigpt_cli.core.errors import UserError
from minigpt_cli.distributed.device import find_device
from minigpt_cli.huggingface.adapter import LoadedAdapter, apply
from minigpt_cli.huggingface.base_model import BaseModel
from minigpt_cli.huggingface.load import TrainedModel, load_model


def load_and_report(path: Path, adapters: list[Path] | None, device: str | None) -> TrainedModel:
    """Load a model with its first adapter onto a device, and say which checkpoint it is."""
    trained = load_model(path, choose_device(device), adapters or [])
    report_base(trained.base)
    return trained


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
