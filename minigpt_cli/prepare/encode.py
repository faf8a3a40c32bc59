"""Encode batches of text in worker processes.

A worker is a child process with two pipes. It ends when its input ends, so it never outlives the
parent. It runs in its own session, so Ctrl-C reaches the parent alone. benchmarks/LOG.md compares
this with ProcessPoolExecutor.
"""

import itertools
import os
import signal
import struct
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from minigpt_cli.core.errors import UserError
from minigpt_cli.core.signals import ignore_signals

# A worker holds the encodings of this much text at a time.
_AT_ONCE = 64 << 10
_F_SETPIPE_SZ = 1031  # Linux; in the fcntl module where it is supported


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


class _Worker:
    """A child process; a second batch waits in its pipe while it works on the first.

    A thread takes ``receiving`` before it releases ``sending``. So replies are read in the order
    of the batches.
    """

    def __init__(self, process: "subprocess.Popen[bytes]"):
        self.process = process
        self.sending = threading.Lock()
        self.receiving = threading.Lock()


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
    started: list[_Worker] = []
    mine = threading.local()
    numbers = itertools.count()
    lock = threading.Lock()
    closed = False

    def encode(batch: TextBatch) -> Ids:
        if not hasattr(mine, "worker"):
            with lock:  # so that no process starts after the others were killed
                if closed:
                    raise RuntimeError("the workers were stopped")
                number = next(numbers) % workers  # two threads to each process
                if number == len(started):
                    started.append(_Worker(_start(tokenizer, eos, dtype)))
                mine.worker = started[number]
        return _exchange(mine.worker, batch)

    pool = ThreadPoolExecutor(2 * workers, thread_name_prefix="encode")
    try:
        yield lambda batch: pool.submit(encode, batch)
    finally:
        with lock:
            closed = True
            for worker in started:
                worker.process.kill()
        pool.shutdown(wait=True, cancel_futures=True)
        for worker in started:
            worker.process.communicate()


def _start(tokenizer: Path, eos: int, dtype: str) -> "subprocess.Popen[bytes]":
    package = Path(__file__).resolve().parents[2]
    paths = [str(package), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TOKENIZERS_PARALLELISM": "false",  # one core each
    }
    # -P: the working directory may be the corpus, and hold a file of a module's name.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, str(tokenizer), str(eos), dtype],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,
    )
    for pipe in (process.stdin, process.stdout):
        _widen(pipe)
    return process


def _widen(pipe: object) -> None:
    """Let a whole batch fit into the pipe, so that the processes switch less often."""
    try:
        import fcntl

        fcntl.fcntl(pipe.fileno(), _F_SETPIPE_SZ, 1 << 20)  # type: ignore[attr-defined]
    except (ImportError, OSError):
        pass  # another system, or beyond the user's limit: only slower


def _exchange(worker: _Worker, batch: TextBatch) -> Ids:
    process = worker.process
    assert process.stdin is not None
    assert process.stdout is not None
    lengths = array("Q", map(len, batch.pieces)).tobytes()
    head = struct.pack("<Q", len(batch.pieces)) + lengths + batch.flags
    try:
        with worker.sending:
            process.stdin.write(b"".join((head, *batch.pieces)))
            process.stdin.flush()
            worker.receiving.acquire()
        try:
            train, val, failure = struct.unpack("<QQQ", _read(process.stdout, 24))
            if failure:
                raise RuntimeError(f"encoding failed: {_read(process.stdout, failure).decode()}")
            return _read(process.stdout, train), _read(process.stdout, val)
        finally:
            worker.receiving.release()
    except (BrokenPipeError, EOFError):
        code = process.wait()
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise UserError(
            f"a tokenizer process died ({reason}); if memory ran out, run the same command again "
            "with fewer --workers: it continues where it stopped"
        ) from None


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _serve(requests: IO[bytes], replies: IO[bytes], file: str, eos: int, dtype: str) -> None:
    from minigpt_cli.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(file)
    typecode = {"uint16": "H", "uint32": "I"}[dtype]
    while head := requests.read(8):
        (count,) = struct.unpack("<Q", head)
        lengths = array("Q", _read(requests, 8 * count))
        flags = _read(requests, count)
        texts = [_read(requests, length).decode(errors="replace") for length in lengths]
        out: tuple[list[array[int]], list[array[int]]] = ([], [])
        start = 0
        while start < count:
            stop, size = start + 1, lengths[start]
            while stop < count and size + lengths[stop] <= _AT_ONCE:
                size += lengths[stop]
                stop += 1
            encodings = tokenizer.encode_batch_fast(texts[start:stop], add_special_tokens=False)
            for flag, encoding in zip(flags[start:stop], encodings, strict=True):
                ids = array(typecode, encoding.ids)  # twice as fast as extending one
                if flag & LAST:
                    ids.append(eos)
                if sys.byteorder == "big":
                    ids.byteswap()
                out[1 if flag & VAL else 0].append(ids)
            start = stop
        train, val = map(b"".join, out)
        replies.write(struct.pack("<QQQ", len(train), len(val), 0))
        replies.write(train)
        replies.write(val)
        replies.flush()


def _main() -> None:
    # The parent handles signals to the process group or the Slurm step, and then kills the workers.
    ignore_signals()
    file, eos, dtype = sys.argv[1:]
    with os.fdopen(os.dup(0), "rb") as requests, os.fdopen(os.dup(1), "wb") as replies:
        os.dup2(2, 1)  # prints of libraries go to standard error, not among the replies
        try:
            _serve(requests, replies, file, int(eos), dtype)
        except (BrokenPipeError, EOFError):
            os._exit(1)  # the parent is gone; skip the flush at exit, which would fail again
        except Exception as error:
            message = f"{type(error).__name__}: {error}".encode()
            replies.write(struct.pack("<QQQ", 0, 0, len(message)) + message)


if __name__ == "__main__":
    _main()
