"""Encode batches of text in worker processes.

A worker is a child process with one connection. It ends when its connection does, so it never
outlives the parent. It runs in its own session, so Ctrl-C reaches the parent alone.
ProcessPoolExecutor would wait for ever if a worker is killed while it sends a result
(benchmarks/LOG.md).
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt_cli.core.child import child_environment, ending, failure, limit_resources
from minigpt_cli.core.errors import UserError
from minigpt_cli.core.signals import ignore_signals

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# A worker holds the encodings of this much text at a time.
_AT_ONCE = 64 << 10
_MEMORY_PER_BYTE = 400  # of a batch: a piece may be as long as that


@dataclass(frozen=True)
class TextBatch:
    """Pieces of text for one worker.

    Attributes:
        pieces: UTF-8 text.
        flags: one byte per piece: ``LAST``, ``VAL``, both or 0.
    """

    pieces: tuple[bytes, ...]
    flags: bytes


LAST = 1  # end-of-text follows the piece
VAL = 2  # the piece belongs to validation

# The ids of a batch, as the raw little-endian bytes of the dataset's type: (train, val).
Ids = tuple[bytes, bytes]


@contextmanager
def encoders(
    workers: int, tokenizer: Path, eos: int, dtype: str
) -> Iterator[Callable[[TextBatch], Future[Ids]]]:
    """Start worker processes as they are needed; kill them on exit, also after an exception.

    Args:
        workers: the largest number of processes.
        tokenizer: a file or directory for ``load_tokenizer``.
        eos: the id that follows a piece with the flag ``LAST``.
        dtype: "uint16" or "uint32".

    Yields:
        A function that submits a batch. Its future gives the ids. The future raises ``UserError``
        if the worker died.
    """
    started: list[subprocess.Popen[bytes]] = []
    mine = threading.local()
    lock = threading.Lock()
    closed = False

    def encode(batch: TextBatch) -> Ids:
        if not hasattr(mine, "process"):
            with lock:  # so that no process starts after the others were killed
                if closed:
                    raise RuntimeError("the workers were stopped")
                mine.process, mine.connection = _start(tokenizer, eos, dtype)
                started.append(mine.process)
        return _exchange(mine.process, mine.connection, batch)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="encode")  # a thread for each process
    try:
        yield lambda batch: pool.submit(encode, batch)
    finally:
        with lock:
            closed = True
            for process in started:
                process.kill()
        pool.shutdown(wait=True, cancel_futures=True)
        for process in started:
            process.wait()


def _start(tokenizer: Path, eos: int, dtype: str) -> tuple["subprocess.Popen[bytes]", Connection]:
    ours, theirs = Pipe()
    with theirs:
        arguments = (theirs.fileno(), tokenizer, eos, dtype)
        # -P: the working directory may be the corpus, and hold a file of a module's name.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=2,  # prints of libraries
            env=child_environment(),
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    return process, ours


def _exchange(process: "subprocess.Popen[bytes]", connection: Connection, batch: TextBatch) -> Ids:
    try:
        # A worker that failed reads no more, but it has answered.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.send((batch.pieces, batch.flags))
        reply: Ids | str = connection.recv()
    except (OSError, EOFError):
        connection.close()  # so that the worker ends, if it still runs
        code = process.wait()
        if code == -signal.SIGKILL:
            raise UserError(
                "a tokenizer process died (SIGKILL); if memory ran out, run the same command again "
                "with fewer --workers: it continues where it stopped"
            ) from None
        raise UserError(f"the tokenizer {ending(code)} for a text: use another one") from None
    if isinstance(reply, str):
        raise UserError(f"the tokenizer {reply}")
    return reply


def _serve(connection: Connection, file: str, eos: int, dtype: str) -> None:
    """Answer each batch with its ids, until the parent has gone; or once with an error."""
    problem = "can't be loaded"
    try:
        from minigpt_cli.data.tokenizer import load_tokenizer_here

        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust's panics print pages
        tokenizer = load_tokenizer_here(file)
        problem = "fails on a text"
        while (batch := _receive(connection)) is not None:
            limit_resources(sum(map(len, batch[0])), _MEMORY_PER_BYTE)
            _answer(connection, _encode(tokenizer, *batch, eos, dtype))
    except BaseException as error:  # a panic of Rust is no Exception
        _answer(connection, f"{problem}: {failure(error)}")


def _receive(connection: Connection) -> tuple[tuple[bytes, ...], bytes] | None:
    """Return the pieces and flags of the next batch; None if the parent has gone."""
    try:
        batch: tuple[tuple[bytes, ...], bytes] = connection.recv()
        return batch
    except (OSError, EOFError):
        return None


def _answer(connection: Connection, answer: Ids | str) -> None:
    with contextlib.suppress(OSError):  # the parent has gone: there will be no next batch
        connection.send(answer)


def _encode(
    tokenizer: "Tokenizer", pieces: tuple[bytes, ...], flags: bytes, eos: int, dtype: str
) -> Ids:
    typecode = {"uint16": "H", "uint32": "I"}[dtype]
    out: tuple[list[array[int]], list[array[int]]] = ([], [])
    start = 0
    while start < len(pieces):
        stop, size = start + 1, len(pieces[start])
        while stop < len(pieces) and size + len(pieces[stop]) <= _AT_ONCE:
            size += len(pieces[stop])
            stop += 1
        texts = [piece.decode(errors="replace") for piece in pieces[start:stop]]
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for flag, encoding in zip(flags[start:stop], encodings, strict=True):
            ids = array(typecode, encoding.ids)  # twice as fast as extending one
            if flag & LAST:
                ids.append(eos)
            if sys.byteorder == "big":
                ids.byteswap()
            out[1 if flag & VAL else 0].append(ids)
        start = stop
    return b"".join(out[0]), b"".join(out[1])


if __name__ == "__main__":
    # The parent handles signals to the process group or the Slurm step, and then kills the workers.
    ignore_signals()
    _serve(Connection(int(sys.argv[1])), sys.argv[2], int(sys.argv[3]), sys.argv[4])
