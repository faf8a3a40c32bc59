"""Save a run's checkpoints, one at a time, while training goes on.

All ranks copy their tensors to memory and train on. Meanwhile each rank writes, flushes and hashes
its own files; then rank 0 writes the manifest and renames the directory. Only the names and
hashes of files are gathered. Every rank learns whether the save succeeded.
"""

import contextlib
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from minigpt_cli.checkpoint.commit import (
    abandon,
    begin,
    commit,
    failure_reason,
    flush_files,
    free_bytes,
    unfinished_path,
)
from minigpt_cli.checkpoint.manifest import FileEntry, TensorEntry
from minigpt_cli.checkpoint.store import prune
from minigpt_cli.checkpoint.tensors import (
    bytes_of,
    is_file_of,
    own_files,
    own_part,
    save_tensors,
    tensor_entry,
)
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.run_dir import checkpoint_path
from minigpt_cli.core.threads import device_thread
from minigpt_cli.distributed.failure import is_lost_rank
from minigpt_cli.distributed.world import World
from minigpt_cli.recipe import CheckpointSettings

# A rank's report on its part: its files, the bytes of their tensors, the reason of a failure.
_PART = tuple[dict[str, FileEntry], int, str | None]


@dataclass(frozen=True)
class SaveResult:
    """How a save ended: the same on every rank."""

    step: int
    path: Path  # the checkpoint's directory
    problem: str | None  # why it failed; None: the checkpoint is on disk


class Saver:
    """Saves a run's checkpoints in the background. All ranks make the same calls.

    Args:
        run: The run directory.
        world: The ranks that save together.
        settings: Whether saves are asynchronous, and which checkpoints are kept.

    Attributes:
        last_saved_step: The step of the last save that succeeded, as far as ``poll`` and ``wait``
            have returned it; None if there was none. A resume or a rollback may set it.
    """

    def __init__(self, run: Path, world: World, settings: CheckpointSettings):
        self.last_saved_step: int | None = None
        self._run = run
        self._world = world
        self._settings = settings
        self._thread = device_thread("saver", world.device)
        self._save: Future[SaveResult] | None = None
        on_gpu = world.device.type == "cuda"
        # One for all saves, so that the memory of the copies is reused.
        self._stager = DefaultStager(StagingOptions(on_gpu, False, False, on_gpu))

    def start(
        self,
        step: int,
        tensors: dict[str, Tensor],
        small_files: dict[str, bytes],
        val_loss: float | None,
    ) -> None:
        """Start a save. The tensors may be changed when this returns.

        Args:
            step: The checkpoint's step.
            tensors: See ``tensors_of``.
            small_files: Name -> content, of the other files.
            val_loss: The validation loss at this step; None if there was no evaluation.
        """
        assert self._save is None, "one save at a time: wait() first"
        entries = {name: tensor_entry(tensor) for name, tensor in tensors.items()}
        size, world = bytes_of(tensors), self._world
        directory = unfinished_path(self._run, step)
        problem = self._begin(step, size, small_files)
        if problem is not None:
            self._save = Future()
            self._save.set_result(self._failed(step, problem))
            return
        written = None
        try:
            part = own_part(tensors, world.rank, world.size)
            if self._settings.asynchronous:
                part = self._stager.stage(part)
            written = self._thread.submit(save_tensors, directory, part, entries, world.rank)
        except Exception as error:  # too little memory for the copy; the other ranks will hear
            problem = failure_reason(error)
        if not self._settings.asynchronous:
            self._await(written)
        self._save = self._thread.submit(
            self._finish,
            step,
            directory,
            written,
            problem,
            list(small_files),
            entries,
            size,
            val_loss,
        )

    def poll(self) -> SaveResult | None:
        """Return how the running save ended; None if it is still running, or none is."""
        return self._take() if self._save is not None and self._save.done() else None

    def wait(self) -> SaveResult | None:
        """Wait for the running save and return how it ended; None if none is. A collective."""
        self._await(self._save)
        return self._take()

    def _take(self) -> SaveResult | None:
        save, self._save = self._save, None
        if save is None:
            return None
        result = save.result()
        if result.problem is None:
            self.last_saved_step = result.step
        return result

    def _await(self, work: "Future[Any] | None") -> None:
        """Wait, for any time, until every rank's work is done.

        A lost rank ends this wait soon. The save's own collectives time out after an hour only.
        """
        while any(self._world.all_reduce_max(work is not None and not work.done())):
            wait([] if work is None else [work], timeout=0.5)

    def close(self) -> None:
        """Wait for the running save on this rank, and free the memory for copies."""
        self._thread.shutdown(wait=True)
        self._stager.close()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not is_lost_rank(error):  # else a save would never end
            self.close()

    def _begin(self, step: int, size: int, small_files: dict[str, bytes]) -> str | None:
        """Make the directory on rank 0; return the reason of a failure on every rank."""
        problem = None
        if self._world.rank == 0:
            try:
                begin(self._run, step, small_files)
                if (free := free_bytes(self._run)) < size:
                    problem = f"it takes {_size(size)}, and {_size(free)} are free"
            except OSError as error:
                problem = failure_reason(error)
        return self._world.all_gather_json(problem, str | None)[0]

    def _finish(
        self,
        step: int,
        directory: Path,
        written: "Future[int] | None",
        problem: str | None,
        small_files: list[str],
        tensors: dict[str, TensorEntry],
        size: int,
        val_loss: float | None,
    ) -> SaveResult:
        """Flush and hash this rank's files; commit on rank 0. A collective, in the thread."""
        world, files, done = self._world, {}, 0
        try:
            if written is not None:
                done = written.result()
            own = own_files(directory, world.rank)
            if world.rank == 0:
                own += [directory / name for name in small_files]
            files = flush_files(own)
        except Exception as error:
            problem = problem or failure_reason(error)
        answers = world.all_gather_json((files, done, problem), _PART, world.saving)
        problems = [each for _, _, each in answers if each is not None]
        for rank, (of_rank, _, _) in enumerate(answers):
            may_write = small_files if rank == 0 else []
            if any(name not in may_write and not is_file_of(name, rank) for name in of_rank):
                problems.append(f"rank {rank} reports a file that is not its own")
        if not problems and (done := sum(each for _, each, _ in answers)) != size:
            problems = [f"the ranks wrote {done} of {size} bytes"]  # each planned its own part
        if not problems and world.rank == 0:
            files = {name: entry for each, _, _ in answers for name, entry in each.items()}
            try:
                commit(self._run, step, files, tensors, val_loss)
            except OSError as error:
                problems = [failure_reason(error)]
            else:
                with contextlib.suppress(OSError):  # it is retried after the next save
                    prune(
                        self._run,
                        keep_last=self._settings.keep_last,
                        keep_best=self._settings.keep_best,
                        keep_every=self._settings.keep_every,
                    )
        problems = world.all_gather_json(problems, list[str], world.saving)[0]
        return self._failed(step, problems[0]) if problems else self._result(step, None)

    def _failed(self, step: int, problem: str) -> SaveResult:
        if self._world.rank == 0:
            abandon(self._run, step)
        return self._result(step, problem)

    def _result(self, step: int, problem: str | None) -> SaveResult:
        return SaveResult(step, checkpoint_path(self._run, step), problem)


def check_room(run: Path, size: int, settings: CheckpointSettings) -> str | None:
    """Return a warning if the disk is too small for all checkpoints that will be kept.

    Args:
        run: The run directory.
        size: Bytes of one checkpoint.
        settings: Which checkpoints are kept.

    Raises:
        UserError: There is no room even for one.
    """
    free = free_bytes(run)
    if free < size:
        raise UserError(
            f"{run}: a checkpoint takes {_size(size)}, and {_size(free)} are free: make room, or "
            "choose another --out"
        )
    most = settings.keep_last + settings.keep_best + 1  # and the one that is being written
    if free < most * size:
        return (
            f"{run}: up to {most} checkpoints of {_size(size)} will be there at once, and "
            f"{_size(free)} are free; a save that finds no room is retried at the next interval"
        )
    return None


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
