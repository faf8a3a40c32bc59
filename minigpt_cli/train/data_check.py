"""Verify a run's dataset on all ranks, then open it."""

import platform
from pathlib import Path

from minigpt_cli.core.console import counted, log
from minigpt_cli.core.errors import UserError
from minigpt_cli.data.dataset_manifest import damaged, read_dataset_manifest
from minigpt_cli.data.file_checks import FileState, file_states
from minigpt_cli.data.sequences import TrainingData, open_data
from minigpt_cli.data.verification import changed_content, recall, remember, storage_key
from minigpt_cli.distributed.world import World
from minigpt_cli.recipe import Recipe

_WORTH_A_LINE = 10_000_000_000  # bytes, which take some seconds


def open_verified_data(recipe: Recipe, world: World) -> TrainingData:
    """Open the recipe's dataset on every rank, after a comparison with its manifest.

    Raises:
        UserError: there is no dataset, or no sequence to train on in it.
        Damaged: a file isn't as recorded.
    """
    states = verify_on_each_storage(Path(recipe.data_path), world) if recipe.data.verify else None
    return open_data(recipe, states)


def verify_on_each_storage(path: Path, world: World) -> dict[str, FileState]:
    """Compare every byte of a dataset with its manifest; every rank calls it.

    Ranks that see the same files divide them. Where machines have copies of their own, the ranks of
    each machine divide its copy.

    Args:
        path: the dataset's directory.
        world: this process among the others.

    Returns:
        The states of the files when they were compared, by name.

    Raises:
        UserError: there is no dataset, or another one on another machine.
        Damaged: a file isn't as recorded, on any machine.
    """
    manifest = read_dataset_manifest(path)
    states = file_states(path, manifest)
    content = manifest.fingerprint
    seen = world.all_gather_json([content, storage_key(states)], list[str])
    if any(each[0] != content for each in seen):
        raise UserError(
            f"{path}: machines hold different datasets: copy one of them to all machines, or use a "
            "directory that all of them see"
        )
    sharers = [rank for rank, each in enumerate(seen) if each == seen[world.rank]]
    shared = len(sharers) == world.size

    def known_files() -> list[str]:
        return sorted(recall(path, manifest, states))

    # Not every machine's cache directory is the one that rank 0 wrote to
    known = set(world.run_on_rank0(known_files, list[str]) if shared else known_files())
    # All sharers cut the same list, also if one knows more files than another
    largest_first = sorted(manifest.files(), key=lambda each: -each[0].bytes_on_disk)
    own = largest_first[sharers.index(world.rank) :: len(sharers)]
    size = sum(shard.bytes_on_disk for shard, _ in own if shard.file not in known)
    if size > _WORTH_A_LINE:
        ranks = f", on each of {len(sharers)} ranks" if len(sharers) > 1 else ""
        log(f"{path}: comparing {size / 1e9:,.0f} GB with their sha256{ranks}")
    found = world.all_gather_when_done(
        (platform.node(), changed_content(path, own, known, world.local_size)),
        tuple[str, dict[str, str]],
    )
    if world.rank == sharers[0]:
        remember(path, manifest, states, {name for rank in sharers for name in found[rank][1]})
    _raise_damage(path, found, several=not shared)
    return states


def _raise_damage(path: Path, found: list[tuple[str, dict[str, str]]], several: bool) -> None:
    """Raise the same error on all ranks if one of them has found damage.

    Args:
        path: the dataset's directory.
        found: of each rank: its machine, and name of a damaged file -> what is wrong with it.
        several: whether machines have copies of their own.
    """
    damage = [(host, name, text) for host, files in found for name, text in files.items()]
    if not damage:
        return
    host, name, problem = damage[0]
    more = f" (and {counted(len(damage) - 1, 'other file')})" if len(damage) > 1 else ""
    where = f" on {host}" if several else ""
    raise damaged(path / name, f"{problem}{where}{more}")
