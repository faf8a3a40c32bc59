"""``--nproc``: run a command as several workers, and end as they ended.

Signals reach the main thread of this process, which passes them on to the workers; torch's agent,
which starts the workers and sees them end, runs in a thread beside it. So a signal is acted on
whatever the agent waits for.
"""

import contextlib
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from minigpt_cli.core.console import error_line
from minigpt_cli.core.errors import Stopped, UserError
from minigpt_cli.distributed.endpoint import ONE_NODE, find, parse
from minigpt_cli.distributed.watch import LAUNCHER, SIGNALS
from minigpt_cli.distributed.workers import Ending, Patience, Workers

GIVE_UP_SECONDS = 30.0
"""How long the agent may take to stop what it does before there are workers."""


def launch(
    arguments: list[str],
    *,
    nproc: int,
    nnodes: int = 1,
    rdzv_endpoint: str | None = None,
    grace_seconds: float = Patience.saved,
) -> int:
    """Run ``python -m minigpt_cli <arguments>`` as ``nproc`` workers on each of ``nnodes`` nodes.

    To be called in the main thread, with the same arguments on every node. The workers inherit the
    environment, standard output and standard error. SIGTERM, SIGINT, SIGHUP and SIGUSR1 are passed
    on to them; they save, however long it takes, and exit with 75 (130 after SIGINT).

    Args:
        rdzv_endpoint: HOST:PORT, where HOST is one of the nodes; not needed for one node.
        grace_seconds: once one worker has stopped and saved, how long the others may take.

    Returns:
        What the command exits with, on every node: 0 when all workers did; the code of the first
        that failed (1 if a signal killed it, with one line about it on standard error); 75 or 130
        when they were stopped and no worker failed.

    Raises:
        UserError: a number or the endpoint is wrong, the endpoint can't be reached, or not all
            nodes came.
        Stopped: before the workers were started.
    """
    if {"", os.getcwd()} & set(sys.path):
        python = [sys.executable]
    else:  # nor may the workers import what happens to lie in the working directory
        python = [sys.executable, "-P"]
    return run(
        [*python, "-m", "minigpt_cli", *arguments],
        nproc=nproc,
        nnodes=nnodes,
        rdzv_endpoint=rdzv_endpoint,
        patience=Patience(saved=grace_seconds),
    )


def run(
    command: list[str],
    *,
    nproc: int,
    nnodes: int = 1,
    rdzv_endpoint: str | None = None,
    patience: Patience,
) -> int:
    """``launch`` for any command whose processes call ``follow_launcher``."""
    if nproc < 1:
        raise UserError(f"--nproc must be at least 1, not {nproc}")
    if nnodes < 1:
        raise UserError(f"--nnodes must be at least 1, not {nnodes}")
    if rdzv_endpoint is not None:
        parse(rdzv_endpoint)
    elif nnodes > 1:
        raise UserError(
            f"--nnodes {nnodes} needs --rdzv-endpoint HOST:PORT: the name or address of one of the "
            "nodes and a free port on it, the same on every node"
        )
    workers = Workers()
    events: queue.SimpleQueue[signal.Signals | Ending | BaseException] = queue.SimpleQueue()

    def start_and_wait() -> None:
        # The workers inherit it; also, a signal is the main thread's.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            endpoint = ONE_NODE
            if rdzv_endpoint is not None:
                endpoint = find(rdzv_endpoint, patience.reach, lambda: workers.signum is not None)
            if nnodes > 1:
                error_line(f"waiting for {nnodes} nodes at {endpoint}")
            events.put(
                _import_agent()(
                    command,
                    nproc=nproc,
                    nnodes=nnodes,
                    endpoint=endpoint,
                    workers=workers,
                    patience=patience,
                )
            )
        except BaseException as error:
            events.put(error)

    os.environ[LAUNCHER] = str(os.getpid())
    try:
        with _signals_to(events.put):
            threading.Thread(target=start_and_wait, name="agent", daemon=True).start()
            end = _pass_signals(events, workers)
    finally:
        del os.environ[LAUNCHER]
    if end.message:
        error_line(end.message)
    return end.code


def _import_agent() -> Callable[..., Ending]:
    """Import torch with its C++ side's warnings off, which it reads from the environment then.

    When a node leaves the rendezvous, they would be pages of a backtrace.
    """
    level = "TORCH_CPP_LOG_LEVEL"
    with contextlib.ExitStack() as workers_have_their_own:
        if level not in os.environ:
            os.environ[level] = "ERROR"
            workers_have_their_own.callback(os.environ.pop, level)
        from minigpt_cli.distributed.agent import run_agent
    return run_agent


def _pass_signals(
    events: "queue.SimpleQueue[signal.Signals | Ending | BaseException]", workers: Workers
) -> Ending:
    """Pass signals on until the agent ends; return how, or raise its error."""
    while True:
        event: signal.Signals | Ending | BaseException | None
        stopping = workers.signum is not None and not workers.processes
        try:
            event = events.get(timeout=GIVE_UP_SECONDS if stopping else None)
        except queue.Empty:
            event = None
        if isinstance(event, signal.Signals):
            workers.stop(event)
        elif isinstance(event, Ending):
            return event
        elif workers.signum is not None and not workers.processes:
            raise Stopped(
                f"stopped by {signal.Signals(workers.signum).name} before training began; "
                "run the same command again to go on",
                workers.signum,
            ) from None
        elif event is not None:
            raise event


@contextlib.contextmanager
def _signals_to(put: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Signals that come when the workers have ended change nothing any more."""
    previous = {}
    for signum in SIGNALS:
        if signal.getsignal(signum) is not signal.SIG_IGN:  # under nohup, or in the background
            previous[signum] = signal.signal(signum, lambda number, _: put(signal.Signals(number)))
    try:
        yield
    except BaseException:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
        raise
    for signum in previous:
        signal.signal(signum, signal.SIG_IGN)
