"""torch's elastic agent, run in this process: nodes meet, ranks are given out, workers start.

What torch's agent does after that is replaced, because it would lose work: 30 s after the first
worker has ended it kills the others, whatever they are saving; it starts all workers anew when one
more node knocks; and of how a run ended it tells neither the code nor the other nodes.
"""

import json
import logging
import queue
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from typing import Any

from torch.distributed import DistError, Store, TCPStore
from torch.distributed.elastic.agent.server import RunResult, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousError,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    DynamicRendezvousHandler,
    RendezvousTimeout,
)

from minigpt_cli.core.errors import Stopped, UserError
from minigpt_cli.distributed.endpoint import Endpoint
from minigpt_cli.distributed.workers import DONE, Ending, Patience, Workers

RUN_ID = "minigpt"


def run_agent(
    command: list[str],
    *,
    nproc: int,
    nnodes: int,
    endpoint: Endpoint,
    workers: Workers,
    patience: Patience,
) -> Ending:
    """Run ``command`` as ``nproc`` workers here, together with the other nodes, to the end of all.

    Not to be called in the main thread, where torch's agent would take the signals.

    Raises:
        UserError: the rendezvous is no rendezvous, or not all nodes came to it.
        Stopped: another node left before training began.
    """
    quiet = logging.getLogger("torch.distributed.elastic")  # tables and tracebacks for programmers
    quiet.addHandler(logging.NullHandler())
    quiet.propagate = False
    store, hosts = _store(endpoint, patience.reach)
    handler = DynamicRendezvousHandler.from_backend(
        RUN_ID,
        store,
        _Backend(store, workers, patience.join),
        min_nodes=nnodes,
        max_nodes=nnodes,
        local_addr=endpoint.own_address,
        timeout=RendezvousTimeout(join=timedelta(seconds=patience.join)),
    )
    spec = WorkerSpec(
        role="minigpt",
        local_world_size=nproc,
        entrypoint=command[0],
        args=tuple(argument.replace("$", "$$") for argument in command[1:]),  # read as a template
        rdzv_handler=handler,
        max_restarts=0,
        local_addr=endpoint.own_address,
    )
    try:
        with tempfile.TemporaryDirectory(prefix="minigpt-") as logs:
            agent = _Agent(spec, DefaultLogsSpecs(logs), workers, patience, hosts)
            agent.run()
            if agent.ending is None:  # it waited as one node too many while the others trained
                raise RendezvousClosedError
            return agent.ending
    except RendezvousTimeoutError:
        raise UserError(
            f"waited {patience.join:.0f} s at {endpoint}, but {nnodes} nodes did not come: run the "
            f"same command on each of them, and see that --nnodes {nnodes} is right"
        ) from None
    except (RendezvousError, DistError):
        raise Stopped(
            f"the rendezvous at {endpoint} was closed before training began, because another node "
            "has left it; run the same command on all nodes again",
            signal.SIGTERM,
        ) from None
    finally:
        handler.shutdown()


def _store(endpoint: Endpoint, seconds: float) -> tuple[TCPStore, bool]:
    """Host the rendezvous, or else find it where another process does.

    Returns:
        The store, and whether it is hosted here.
    """
    reason = ""
    for hosts in (True, False) if endpoint.is_here else (False,):
        connected: queue.SimpleQueue[TCPStore | Exception] = queue.SimpleQueue()
        # In a thread, because torch's time limit doesn't cover a listener that never answers.
        arguments = (endpoint, hosts, seconds, connected.put)
        threading.Thread(target=_connect, args=arguments, name="connect", daemon=True).start()
        try:
            store = connected.get(timeout=seconds + 1)
        except queue.Empty:
            store = TimeoutError(f"it doesn't answer within {seconds:.0f} s")
        if isinstance(store, TCPStore):
            return store, hosts
        reason = str(store).splitlines()[0]
    raise UserError(
        f"--rdzv-endpoint {endpoint}: no rendezvous is there or can be opened there ({reason}); "
        "choose another port"
    )


def _connect(
    endpoint: Endpoint, hosts: bool, seconds: float, put: Callable[[TCPStore | Exception], None]
) -> None:
    limit = timedelta(seconds=seconds)
    try:
        put(TCPStore(endpoint.host, endpoint.port, is_master=hosts, timeout=limit))
    except (DistError, ValueError, RuntimeError) as error:
        put(error)


class _Backend(C10dRendezvousBackend):
    """The state of the rendezvous in the store; a node that waits for the others gives up here.

    torch would go on waiting through a signal, and for ever where all nodes are there already.
    """

    def __init__(self, store: Store, workers: Workers, seconds: float):
        super().__init__(store, RUN_ID)
        self._workers = workers
        self._deadline = time.monotonic() + seconds
        self._gave_up = False

    def get_state(self) -> Any:
        if not self._gave_up and not self._workers.processes:
            late = time.monotonic() > self._deadline
            if late or self._workers.signum is not None:
                self._gave_up = True  # to close the rendezvous, its state is read again
                raise RendezvousTimeoutError if late else RendezvousError("stopped")
        return super().get_state()


class _Agent(LocalElasticAgent):
    """torch's agent, but for what it does between the start of the workers and their end."""

    def __init__(
        self,
        spec: WorkerSpec,
        logs: DefaultLogsSpecs,
        workers: Workers,
        patience: Patience,
        hosts: bool,
    ):
        super().__init__(spec, logs)
        self._workers = workers
        self._patience = patience
        self._hosts = hosts
        self.ending: Ending | None = None

    def _invoke_run(self, role: str = "minigpt") -> RunResult:
        group = self._worker_group
        self._initialize_workers(group)  # the rendezvous, the ranks, and the start
        started = self._pcontext.subprocess_handlers
        self._workers.started(
            {worker.global_rank: started[worker.local_rank].proc for worker in group.workers}
        )
        nodes = group.group_world_size
        where = f" on node {group.group_rank} ({socket.gethostname()})" if nodes > 1 else ""
        others = _OtherNodes(group.store, nodes, self._hosts, self._workers) if nodes > 1 else None
        try:
            ending = self._workers.wait(
                lambda rank: f"rank {rank}{where}",
                self._patience,
                others.exchange if others else lambda known: known,
            )
        finally:
            self._workers.kill()
        self.ending = others.agree(ending, self._patience) if others else ending
        return RunResult(
            state=WorkerState.SUCCEEDED,  # of the agent: it has seen all workers end
            return_values=dict.fromkeys((w.global_rank for w in group.workers), self.ending.code),
        )


class _OtherNodes:
    """What the launchers tell each other over the store, as long as it can be reached.

    It is gone when the launcher that hosts it was killed. The workers notice that by themselves, so
    the others go on with what they know of their own.
    """

    EVERY = 1.0
    """seconds between two looks"""

    def __init__(self, store: Store, nodes: int, hosts: bool, workers: Workers):
        self._store: Store | None = store
        self._nodes = nodes
        self._hosts = hosts
        self._workers = workers
        self._next = 0.0

    def exchange(self, known: Ending, now: bool = False) -> Ending:
        """Tell how workers ended here and hear how elsewhere; the same for a signal."""
        if self._store is None or (time.monotonic() < self._next and not now):
            return known
        self._next = time.monotonic() + self.EVERY
        try:
            return self._exchange(self._store, known)
        except (DistError, RuntimeError):
            self._store = None
            return known

    def _exchange(self, store: Store, known: Ending) -> Ending:
        if self._workers.signum is not None:
            store.set("signal", str(self._workers.signum))
        elif store.check(["signal"]):
            self._workers.stop(int(store.get("signal")))
        for key, ours in (("failed", known.failed), ("stopped", known != DONE)):
            if ours:  # the first to tell wins
                store.compare_set(key, "", json.dumps(asdict(known)))
            if store.check([key]):
                return Ending(**json.loads(store.get(key)))
        return known

    def agree(self, known: Ending, patience: Patience) -> Ending:
        """Wait until the workers of all nodes have ended; return what all nodes return."""
        own = known
        ends_soon = patience.failed + patience.terminated + 5 * self.EVERY
        deadline = time.monotonic() + (patience.saved if known == DONE else ends_soon)
        known = self.exchange(known, now=True)
        self._count("ended", 1)
        while self._count("ended", 0) < self._nodes and time.monotonic() < deadline:
            time.sleep(0.1)
            known = self.exchange(known)
        known = self.exchange(known, now=True)
        deadline = time.monotonic() + 5 * self.EVERY
        self._count("left", 1)
        while self._hosts and self._count("left", 0) < self._nodes and time.monotonic() < deadline:
            time.sleep(0.1)  # for the others still read the store
        return Ending(known.code, known.message or own.message)

    def _count(self, key: str, amount: int) -> int:
        """Add to a counter of the nodes; all of them where the store is gone."""
        if self._store is not None:
            try:
                return int(self._store.add(key, amount))
            except (DistError, RuntimeError):
                self._store = None
        return self._nodes
