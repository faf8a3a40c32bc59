"""final/: the export of a finished run, for transformers or PEFT."""

from pathlib import Path

from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.core.console import warn
from minigpt_cli.core.errors import UserError, first_line
from minigpt_cli.core.files import remove_stale_directories, sha256_of
from minigpt_cli.core.run_dir import CHECKPOINT_MANIFEST, FINAL, checkpoint_path
from minigpt_cli.huggingface.adapter import open_model
from minigpt_cli.huggingface.card import model_card
from minigpt_cli.huggingface.check_export import Mismatch
from minigpt_cli.huggingface.export import export_adapter, export_model
from minigpt_cli.huggingface.origin import read_origin
from minigpt_cli.train.run import Run


def write_final(run: Run, state: RunState) -> str:
    """Export the last checkpoint to final/ if it isn't there; rank 0 does, the others wait.

    A full disk or too little memory is only a warning: everything is saved.

    Returns:
        A line about the result, for a person.

    Raises:
        Mismatch: transformers reads another model from the export.
    """
    checkpoint = checkpoint_path(run.directory, state.step)
    return run.world.run_on_rank0(lambda: _export(run, checkpoint, run.directory / FINAL), str)


def remove_stale_export(directory: Path) -> None:
    """Remove what a killed export to final/ left in a run directory."""
    remove_stale_directories(directory / FINAL)


def _export(run: Run, checkpoint: Path, final: Path) -> str:
    try:
        origin = {
            "checkpoint": checkpoint.name,
            "manifest_sha256": sha256_of(checkpoint / CHECKPOINT_MANIFEST),
        }
        if origin.items() <= (read_origin(final) or {}).items():
            return f"{final} exists already"
        base, adapters = open_model(checkpoint, [])
        adapter = adapters[0] if adapters else None
        files = {"README.md": model_card(base, run.recipe.name, adapter, alone=True)}
        if adapter is None:
            done = export_model(base, final, files=files, origin=origin, replace=True)
            return f"exported {final}, {done.check}"
        export_adapter(base, adapter, final, files=files, origin=origin, replace=True)
        return f"exported {final}, an adapter in PEFT's format"
    except Mismatch:
        raise
    except (UserError, OSError, MemoryError, RuntimeError) as error:  # torch's: no memory
        warn(
            f"{final} was not made: {first_line(error)}; make it with minigpt export {checkpoint} "
            "OUT"
        )
        return f"everything is saved in {checkpoint}"
