"""What a run that has come to its end leaves behind: final/, for transformers or PEFT."""

import hashlib
import json
from pathlib import Path

from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.adapter import ORIGIN, open_model
from minigpt_cli.checkpoint.card import model_card
from minigpt_cli.checkpoint.directory import sweep
from minigpt_cli.checkpoint.export import FINAL, export_adapter, export_model
from minigpt_cli.checkpoint.manifest import MANIFEST
from minigpt_cli.checkpoint.pretrained import read_json
from minigpt_cli.checkpoint.prove import Mismatch
from minigpt_cli.checkpoint.state import RunState
from minigpt_cli.errors import UserError
from minigpt_cli.report.console import warn
from minigpt_cli.train.run import Run


def write_final(run: Run, state: RunState) -> str:
    """Export the last checkpoint to ``final/``, unless that is there; rank 0 does, the others wait.

    Returns:
        What became of it, for a person.

    Raises:
        Mismatch: transformers reads another model from it.
    """
    checkpoint = store.checkpoint_path(run.directory, state.step)
    return run.world.run_on_rank0(lambda: _export(run, checkpoint, run.directory / FINAL))


def clear(directory: Path) -> None:
    """Clear away what an export to ``final/`` left that was killed."""
    sweep(directory / FINAL)


def _export(run: Run, checkpoint: Path, final: Path) -> str:
    try:
        origin = {
            "checkpoint": checkpoint.name,
            "manifest_sha256": hashlib.sha256((checkpoint / MANIFEST).read_bytes()).hexdigest(),
        }
        text = json.dumps(origin, indent=2) + "\n"
        if (final / ORIGIN).is_file() and origin.items() <= read_json(final / ORIGIN).items():
            return f"{final} is there"
        base, adapters = open_model(checkpoint, [])
        adapter = adapters[0] if adapters else None
        files = {"README.md": model_card(base, run.recipe.name, adapter, alone=True)}
        if adapter is None:
            files[ORIGIN] = text
            return f"exported {final}, {export_model(base, final, files=files, replace=True).proof}"
        export_adapter(base, adapter, final, files=files, provenance=origin, replace=True)
        return f"exported {final}, an adapter in PEFT's format"
    except Mismatch:
        raise
    except (UserError, OSError, MemoryError, RuntimeError) as error:  # torch's: no memory
        # All is trained and saved: a full disk or little memory is no loss.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        warn(f"{final} was not made: {reason}; make it with minigpt export {checkpoint} OUT")
        return f"everything is saved in {checkpoint}"
