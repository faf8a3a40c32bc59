"""``minigpt verify``."""

from pathlib import Path
from typing import Annotated

import typer

from minigpt_cli.commands.options import Debug, Json, Version
from minigpt_cli.core.console import print_json, print_result
from minigpt_cli.core.errors import Damaged, UserError
from minigpt_cli.core.run_dir import FINAL
from minigpt_cli.core.signals import nothing_is_saved

EXAMPLE = "minigpt verify runs/tiny"


def verify_command(
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A run, a checkpoint, an export or a token dataset."),
    ],
    as_json: Json = False,
    version: Version = False,
    debug: Debug = False,
) -> None:
    """Compare files with their recorded checksums.

    Every file must have the size and the sha256 that were recorded when it was written.
    """
    nothing_is_saved()
    checked, damaged = _check(path)
    if as_json:
        print_json({"valid": not damaged, "checked": checked, "damaged": list(damaged)})
    elif not damaged:
        print_result(f"{path}: valid ({checked} checked)")
    if damaged:
        raise Damaged(f"{path}: " + "; ".join(damaged.values()))


def _check(path: Path) -> tuple[int, dict[str, str]]:
    """Return how many things were compared, and damaged file -> what is wrong with it."""
    from minigpt_cli.checkpoint import integrity, store
    from minigpt_cli.data.dataset import verify_dataset
    from minigpt_cli.data.dataset_manifest import is_dataset
    from minigpt_cli.huggingface.origin import ORIGIN, read_origin, verify_export
    from minigpt_cli.huggingface.peft import is_peft_adapter
    from minigpt_cli.huggingface.weights import CONFIG

    if is_dataset(path):
        return 1, {name: f"{name}: {why}" for name, why in verify_dataset(path).items()}
    if is_peft_adapter(path) or any((path / name).is_file() for name in (CONFIG, ORIGIN)):
        return 1, {name: f"{name}: {why}" for name, why in verify_export(path).items()}
    run, checkpoint = store.locate(path)
    if checkpoint:
        return 1, {problem: problem for problem in integrity.verify(checkpoint)}
    checkpoints = [each for _, each in store.list_steps(run)]
    if not checkpoints:
        raise UserError(f"{path}: holds no checkpoint; name a run, a checkpoint or a token dataset")
    store.hold(checkpoints[-1])  # one at least must stay, where the run trains meanwhile
    checked, damaged = 0, dict[str, str]()
    for each in checkpoints:
        try:
            problems = integrity.verify(each)
        except OSError:
            problems = [f"{each}: can't be read"]
        if each.exists():  # else the run, which trains, has just pruned it
            checked += 1
            damaged |= {problem: problem for problem in problems}
    if not checked:
        raise UserError(f"{path}: the run deleted its checkpoints meanwhile; run verify again")
    final = run / FINAL
    try:
        if "files" in (read_origin(final) or {}):  # earlier versions recorded none
            checked += 1
            for name, why in verify_export(final).items():
                damaged[f"{FINAL}/{name}"] = f"{final / name}: {why}"
    except UserError as error:
        damaged[FINAL] = str(error)
    return checked, damaged
