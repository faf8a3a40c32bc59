"""Compare a checkpoint's files with its manifest."""

from pathlib import Path

from minigpt_cli.checkpoint.manifest import CheckpointManifest, read_checkpoint_manifest
from minigpt_cli.checkpoint.shards import mismatched_shards
from minigpt_cli.checkpoint.state import invalid_state
from minigpt_cli.core.errors import Damaged
from minigpt_cli.core.files import os_reason, sha256_of
from minigpt_cli.core.run_dir import CHECKPOINT_MANIFEST
from minigpt_cli.distributed.world import World


def verify(checkpoint: Path) -> list[str]:
    """Compare a checkpoint's files with its manifest.

    Args:
        checkpoint: Its directory.

    Returns:
        A line for each problem; an empty list for a valid checkpoint.
    """
    return verify_on_all_ranks(checkpoint, None)[1]


def verify_on_all_ranks(
    checkpoint: Path, world: World | None
) -> tuple[CheckpointManifest | None, list[str]]:
    """Verify a checkpoint; see ``verify``. Rank 0 looks at the files, all ranks compute checksums.

    Args:
        checkpoint: Its directory.
        world: All its ranks must call; None: this process does all the work.

    Returns:
        The manifest, None if it is damaged, and the problems; the same on every rank.
    """
    rank, ranks = (0, 1) if world is None else (world.rank, world.size)
    found = _look(checkpoint) if rank == 0 else (None, [])
    if world is not None:
        found = world.broadcast_json(found, tuple[CheckpointManifest | None, list[str]])
    manifest, problems = found
    if manifest is None or problems:
        return manifest, problems
    problems = _changed_files(checkpoint, manifest, rank, ranks)
    if rank == 0 and not problems:
        problems = invalid_state(checkpoint, manifest.step, manifest.files)
        problems += mismatched_shards(checkpoint, manifest.tensor_files, manifest.tensors)
    if world is not None:
        answers = world.all_gather_json(problems, list[str])
        problems = sorted({problem for answer in answers for problem in answer})
    return manifest, problems


def _look(checkpoint: Path) -> tuple[CheckpointManifest | None, list[str]]:
    """Read the manifest and compare the directory with it, without reading other files."""
    try:
        manifest = read_checkpoint_manifest(checkpoint)
    except Damaged as error:
        return None, [str(error)]
    problems = []
    for name, entry in manifest.files.items():
        path = checkpoint / name
        try:
            if path.is_symlink() or not path.is_file():
                problems.append(f"{path}: missing")
            elif (size := path.stat().st_size) != entry["bytes"]:
                problems.append(f"{path}: {size} bytes, {entry['bytes']} were written")
        except OSError as error:
            problems.append(f"{path}: can't be read: {os_reason(error)}")
    # An extra file is damage too.
    for path in sorted(checkpoint.iterdir()):
        if path.name != CHECKPOINT_MANIFEST and path.name not in manifest.files:
            problems.append(f"{path}: is not in the manifest")
    return manifest, problems


def _changed_files(
    checkpoint: Path, manifest: CheckpointManifest, rank: int, ranks: int
) -> list[str]:
    """Compare the checksums of this rank's share of the files."""
    problems = []
    for name, entry in list(manifest.files.items())[rank::ranks]:
        path = checkpoint / name
        try:
            if sha256_of(path) != entry["sha256"]:
                problems.append(f"{path}: its content is not what was written (sha256 differs)")
        except OSError as error:
            problems.append(f"{path}: can't be read: {os_reason(error)}")
    return problems


def require_valid(checkpoint: Path, world: World | None = None) -> CheckpointManifest:
    """Return the manifest of a checkpoint that verifies.

    Raises:
        Damaged: It doesn't; the message lists all problems.
    """
    manifest, problems = verify_on_all_ranks(checkpoint, world)
    if manifest is None or problems:
        raise Damaged(
            "; ".join(problems) + ". Use another checkpoint of the run; minigpt verify shows which"
        )
    return manifest
