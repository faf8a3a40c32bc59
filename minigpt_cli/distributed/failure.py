"""Lost ranks: the first rank that fails ends all, and one rank says why.

A rank announces its failure in the store. All others watch for that, end with the same exit code,
and leave it to the first one to print the message.
"""

import contextlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from minigpt_cli.core.console import error_line
from minigpt_cli.core.errors import (
    EXPLAINED_CODES,
    Diverged,
    Outcome,
    RankLost,
    Stopped,
    describe,
    exit_code_of,
)
from minigpt_cli.core.reading import parse_form
from minigpt_cli.core.status import status_name, write_status
from minigpt_cli.distributed.exit_status import resume_hint
from minigpt_cli.distributed.join import (
    ANSWER_SECONDS,
    call_with_timeout,
    leave_world,
    own_rank,
    session,
)

if TYPE_CHECKING:
    from torch.distributed import Store

_FAILURE = "minigpt/failure"  # key: the first failure
_LONGEST_MESSAGE = 10_000  # characters of a failure that another rank tells of
_NOTICE_SECONDS = 2.0  # in which most ranks notice by themselves that another one has failed
_TORCH_ERRORS = ("gloo", "nccl", "connection", "broken pipe", "timed out")  # when a rank is lost


class _FailureEntry(TypedDict):
    """A failure in the store."""

    rank: int
    code: int
    message: str


class _HasStep(Protocol):
    step: int


@dataclass
class StatusRecord:
    """What rank 0 writes status.json from."""

    directory: Path  # of the run
    state: _HasStep | None = None  # where training stands, once that is known

    def write(self, status: str, exit_code: int | None, message: str) -> None:
        step = self.state.step if self.state is not None else None
        write_status(self.directory, status, exit_code, step, message)

    def write_outcome(self, outcome: Outcome) -> None:
        self.write(status_name(outcome.code), outcome.code, outcome.message)


class _Failure:
    """What this process knows of failures."""

    outcome: Outcome | None = None  # how this process ends, once that is decided
    heard: Outcome | None = None  # how another rank's failure ends it, once the store has told
    record: StatusRecord | None = None  # written if the main thread is stuck at the end
    run: Path | None = None  # the run directory, for messages; None before training begins


_failure = _Failure()


def set_run_directory(run: Path) -> None:
    """Name the run in messages about lost ranks from now on."""
    _failure.run = run


@contextlib.contextmanager
def record_status(directory: Path) -> Iterator[StatusRecord]:
    """Keep status.json true while a run is prepared and trained in the ``with`` block."""
    record = _failure.record = StatusRecord(directory)
    record.write("running", None, "")
    try:
        yield record
    except BaseException as error:
        record.write_outcome(announce_failure(error))
        raise
    finally:
        _failure.record = None
    record.write("finished", 0, "")


def rank_lost(who: str, reason: str) -> RankLost:
    """Return the error of a rank that can't reach another one."""
    return RankLost(f"the connection to {who} is lost ({reason}); {resume_hint(_failure.run)}")


def is_lost_rank(error: BaseException) -> bool:
    """Return whether an error says that another rank doesn't answer any more."""
    if session.info is None or not isinstance(error, RuntimeError | RankLost):
        return False
    from torch.distributed import DistError

    text = str(error).lower()
    return isinstance(error, DistError | RankLost) or any(word in text for word in _TORCH_ERRORS)


def announce_failure(error: BaseException) -> Outcome:
    """Tell the other ranks of an error, and return how this process ends: as the first that failed.

    If the store is gone, one rank on each machine shows its own message.
    """
    info = session.info
    if info is None:
        # Each rank gets a signal, also before it has joined; rank 0 prints the message.
        rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
        shown = not isinstance(error, Stopped) or rank == "0"
        return Outcome(exit_code_of(error), describe(error), is_shown_here=shown)
    if _failure.outcome is None:
        if is_lost_rank(error) and not isinstance(error, RankLost):
            first_sentence = re.match(r"\s*(?:\[\S+\] )?(.*?)(?:\. |$)", str(error), re.MULTILINE)
            reason = first_sentence[1] if first_sentence else type(error).__name__
            error = rank_lost("another rank", reason)
        may_be_own = info.rank > 0 and not isinstance(error, Stopped | Diverged | RankLost)
        message = f"rank {info.rank}: {describe(error)}" if may_be_own else describe(error)
        _failure.outcome = Outcome(exit_code_of(error), message)
        _failure.outcome = _agree(_failure.outcome, _NOTICE_SECONDS if may_be_own else 0)
    return _failure.outcome


def _agree(own: Outcome, seconds: float) -> Outcome:
    """Return the outcome of the first rank that failed.

    Args:
        own: this rank's outcome.
        seconds: how long to let rank 0 be the first. An error that all ranks share is rank 0's too,
            and its message bears no rank.
    """
    info, store = session.info, session.store
    assert info is not None
    if store is None:
        return own

    def announce() -> Outcome:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not store.check([_FAILURE]):
            time.sleep(0.02)
        content = json.dumps({"rank": info.rank, "code": own.code, "message": own.message})
        return _read_failure(store.compare_set(_FAILURE, "", content))

    try:
        return call_with_timeout(ANSWER_SECONDS, announce)
    except Exception:
        session.store = None
        if _failure.heard is not None:
            return _failure.heard
        speaks = info.local_rank == 0 or info.rank == 1  # rank 1 in place of a rank 0 that is gone
        return replace(own, is_shown_here=speaks)


def _read_failure(content: bytes) -> Outcome:
    """Check what the store holds of the first failure; other users may have written it.

    Raises:
        ValueError: no rank has written it.
    """
    assert session.info is not None
    failure = parse_form(content, _FailureEntry)
    if not 0 <= failure["rank"] < session.info.size or failure["code"] not in EXPLAINED_CODES:
        raise ValueError("not the failure of a rank")
    message = "".join(c for c in failure["message"] if c.isprintable() or c == "\n")
    message = message[:_LONGEST_MESSAGE]
    return Outcome(failure["code"], message, is_shown_here=failure["rank"] == own_rank())


def start_watch() -> None:
    """Start the thread that ends this process soon after another rank has failed.

    Mostly a rank notices by itself, when the other's connection closes; but not while it still
    waits for that one to join, nor in the middle of a collective of NCCL.
    """
    assert session.store is not None
    # A client of its own: a store in which a thread waits answers no other thread.
    threading.Thread(target=_watch, args=(session.store.clone(),), daemon=True).start()


def _watch(store: "Store") -> None:
    try:
        store.wait([_FAILURE], timedelta(days=365))
        heard = _failure.heard = _read_failure(store.get(_FAILURE))
    except Exception:  # the store is gone
        heard = None
    time.sleep(_NOTICE_SECONDS)
    if _failure.outcome is not None:
        return
    session.store = store  # the main thread may be waiting in the other client
    lost = rank_lost("rank 0", "it exited without reporting an error")
    outcome = heard or announce_failure(lost)
    if _failure.record is not None:
        _failure.record.write_outcome(outcome)
    if outcome.is_shown_here:
        error_line(outcome.message)
    leave_world(patience=4)
    os._exit(outcome.code)
