"""Saves a run's checkpoints, one at a time, while training goes on.

All ranks copy their tensors to memory and train on. Meanwhile each writes, flushes and hashes its
own files; when all have done so, rank 0 writes the manifest and renames the directory. Nothing is
gathered but the names and hashes of files, and every rank learns whether it worked.
"""

import contextlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from minigpt_cli.checkpoint import store
from minigpt_cli.checkpoint.tensors import (
    bytes_of,
    describe,
    own_files,
    save_tensors,
    start_saving_tensors,
)
from minigpt_cli.distributed.failure import is_lost_rank
from minigpt_cli.distributed.world import World
from minigpt_cli.errors import UserError
from minigpt_cli.recipe import Checkpoint as CheckpointRecipe


@dataclass(frozen=True)
class Saved:
    """What became of a save: the same on every rank."""

    step: int
    path: Path
    problem: str | None  # None: it is there


class _Stager(DefaultStager):
    """Copies tensors to memory: on all ranks, or on none.

    One that failed alone would leave the others waiting for it in the engine.
    """

    def __init__(self, world: World):
        on_gpu = world.device.type == "cuda"
        super().__init__(StagingOptions(on_gpu, False, False, on_gpu))
        self._world = world

    def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        copy, problem = {}, None
        try:
            copy = super().stage(state_dict, **kwargs)
        except Exception as error:
            problem = store.why(error)
        if any(self._world.all_reduce_max(problem is not None)):
            raise UserError(next(filter(None, self._world.all_gather_json(problem))))
        assert isinstance(copy, dict)
        return copy


class Saver:
    def __init__(self, run: Path, world: World, keep: CheckpointRecipe):
        self._run = run
        self._world = world
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._running: Future[Saved] | None = None
        self._stager = _Stager(world)

    def start(
        self,
        step: int,
        tensors: dict[str, Tensor],
        small_files: dict[str, bytes],
        val_loss: float | None,
    ) -> None:
        """Begin to save; the tensors may be changed when this returns.

        Args:
            small_files: name -> content, of what stands beside the tensors.
        """
        assert self._running is None, "one save at a time: wait() first"
        described = {name: describe(tensor) for name, tensor in tensors.items()}
        directory, problem = self._begin(step, bytes_of(tensors), small_files)
        if problem is not None:
            self._running = Future()
            self._running.set_result(self._failed(step, problem))
            return
        group = self._world.saving
        try:
            if self._keep.asynchronous:
                written = start_saving_tensors(directory, tensors, group, self._stager)
            else:
                written = self._thread.submit(save_tensors, directory, tensors, group)
        except BaseException as error:  # the engine's errors are not Exceptions
            written, problem = None, store.why(error)
        if not self._keep.asynchronous:
            self._await(written)
        self._running = self._thread.submit(
            self._finish, step, directory, written, problem, list(small_files), described, val_loss
        )

    def poll(self) -> Saved | None:
        """What became of the save that was running, if it is through on this rank."""
        return self._take() if self._running is not None and self._running.done() else None

    def wait(self) -> Saved | None:
        """What became of the save that is running; None if none is. Every rank calls it."""
        self._await(self._running)
        return self._take()

    def _take(self) -> Saved | None:
        running, self._running = self._running, None
        return running.result() if running is not None else None

    def _await(self, work: "Future[Any] | None") -> None:
        """Wait until every rank's work is done.

        It may take as long as it takes, but the ranks must answer: what they do for the save they
        do with a patience of an hour, which nobody should have to wait for where one is lost.
        """
        while any(self._world.all_reduce_max(work is not None and not work.done())):
            wait([] if work is None else [work], timeout=0.5)

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._stager.close()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or not is_lost_rank(error):  # without it no save comes to its end
            self.close()

    def _begin(
        self, step: int, size: int, small_files: dict[str, bytes]
    ) -> tuple[Path, str | None]:
        """Rank 0 makes the directory, if there is room; every rank learns whether."""
        directory, problem = Path(), None
        if self._world.rank == 0:
            try:
                directory = store.begin(self._run, step, small_files)
                if (free := store.free_bytes(self._run)) < size:
                    problem = f"it takes {_size(size)}, and {_size(free)} are free"
            except OSError as error:
                problem = store.why(error)
        where, problem = self._world.all_gather_json([str(directory), problem])[0]
        return Path(where), problem

    def _finish(
        self,
        step: int,
        directory: Path,
        written: "Future[Any] | None",
        problem: str | None,
        small_files: list[str],
        tensors: dict[str, dict[str, Any]],
        val_loss: float | None,
    ) -> Saved:
        world, files = self._world, {}
        try:
            if written is not None:
                written.result()
            own = own_files(directory, world.rank)
            if world.rank == 0:
                own += [directory / name for name in small_files]
            files = store.flush_files(own)
        except BaseException as error:
            problem = problem or store.why(error)
        answers = world.all_gather_json([files, problem], world.saving)
        problems = [each for _, each in answers if each is not None]
        if not problems and world.rank == 0:
            files = {name: entry for each, _ in answers for name, entry in each.items()}
            try:
                store.finish(self._run, step, files, tensors, val_loss)
            except OSError as error:
                problems = [store.why(error)]
            else:
                with contextlib.suppress(OSError):  # tried again after the next save
                    store.retain(
                        self._run,
                        keep_last=self._keep.keep_last,
                        keep_best=self._keep.keep_best,
                        keep_every=self._keep.keep_every,
                    )
        problems = world.all_gather_json(problems, world.saving)[0]
        return self._failed(step, problems[0]) if problems else self._saved(step, None)

    def _failed(self, step: int, problem: str) -> Saved:
        if self._world.rank == 0:
            store.abandon(self._run, step)
        return self._saved(step, problem)

    def _saved(self, step: int, problem: str | None) -> Saved:
        return Saved(step, store.checkpoint_path(self._run, step), problem)


def check_room(run: Path, size: int, keep: CheckpointRecipe) -> str | None:
    """A warning if the disk can't hold all the checkpoints that will be kept.

    Args:
        size: bytes of one checkpoint.

    Raises:
        UserError: it can't hold even one.
    """
    free = store.free_bytes(run)
    if free < size:
        raise UserError(
            f"{run}: a checkpoint takes {_size(size)}, and {_size(free)} are free: make room, or "
            "choose another --out"
        )
    most = keep.keep_last + keep.keep_best + 1  # and the one that is being written
    if free < most * size:
        return (
            f"{run}: up to {most} checkpoints of {_size(size)} will lie there at once, and "
            f"{_size(free)} are free; a save that finds no room is tried again at the next interval"
        )
    return None


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
