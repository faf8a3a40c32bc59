"""What a run that has come to its end leaves behind: final/, for transformers."""

import shutil
from pathlib import Path

from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.adapter import CONFIG as ADAPTER_CONFIG
from minigpt_cli.checkpoint.adapter import open_model
from minigpt_cli.checkpoint.card import model_card
from minigpt_cli.checkpoint.export import export_adapter, export_model
from minigpt_cli.checkpoint.manifest import MANIFEST
from minigpt_cli.checkpoint.pretrained import CONFIG
from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.train.run import Run

FINAL = "final"


def write_final(run: Run, state: RunState) -> str:
    """Export the last checkpoint to ``final/``, unless that is there; rank 0 does, the others wait.

    Returns:
        What became of it, for a person.
    """
    checkpoint = store.checkpoint_path(run.directory, state.step)
    final = run.directory / FINAL
    return run.world.from_first(lambda: _export(run, checkpoint, final))


def sweep(directory: Path) -> None:
    """Remove what an export left that was killed."""
    for left in directory.glob(f".{FINAL}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _export(run: Run, checkpoint: Path, final: Path) -> str:
    done = max(_modified(final / CONFIG), _modified(final / ADAPTER_CONFIG))
    if done > _modified(checkpoint / MANIFEST):
        return f"{final} is there"
    base, adapters = open_model(checkpoint, [])
    if not adapters:
        card = model_card(base, run.recipe.name)
        return f"exported {final}, {export_model(base, final, card=card, replace=True).proof}"
    card = model_card(base, run.recipe.name, adapters[0])
    export_adapter(base, adapters[0], final, card=card, replace=True)
    return f"exported {final}, an adapter in PEFT's format"


def _modified(file: Path) -> float:
    return file.stat().st_mtime if file.exists() else 0.0
