"""Where this process stands among the others, and how they meet.

torchrun and ``--nproc`` say it in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT; srun
in its own variables.
"""

import contextlib
import fcntl
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from minigpt_cli.core.errors import UserError

T = TypeVar("T")
_PATIENCE = 40.0  # seconds: where nobody answers, that is an error within a minute
_COME = 600.0  # seconds that rank 0 may come later than another one
_HERE = "minigpt/here"  # the key of how many ranks have come
_PORT = "minigpt/port"  # the key in the launcher's store of where rank 0 keeps its own


@dataclass(frozen=True)
class Place:
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str  # where rank 0, or its launcher, keeps the store
    port: int
    launcher_keeps_store: bool


def find_place() -> Place | None:
    """This process's place; None if nobody started it as one of several.

    Raises:
        UserError: the environment says only half of it.
    """
    env = os.environ
    if int(env.get("WORLD_SIZE", "1")) > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise UserError(
                f"WORLD_SIZE is {env['WORLD_SIZE']}, but {', '.join(missing)} not set: start with "
                "torchrun, srun or --nproc"
            )
        size = int(env["WORLD_SIZE"])
        return Place(
            rank=int(env["RANK"]),
            size=size,
            local_rank=int(env.get("LOCAL_RANK", "0")),
            local_size=int(env.get("LOCAL_WORLD_SIZE", "1")),
            address=env["MASTER_ADDR"],
            port=int(env["MASTER_PORT"]),
            launcher_keeps_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    if "RANK" not in env and int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return _slurm_place()
    return None


def _slurm_place() -> Place:
    env = os.environ
    # e.g. 4(x2),3: tasks per node of the step
    counts: list[int] = []
    for part in env["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, times = part.rstrip(")").partition("(x")
        counts += [int(tasks)] * int(times or 1)
    address = env.get("MASTER_ADDR")
    if not address:
        alone = len(counts) == 1  # then no name has to be looked up
        address = "127.0.0.1" if alone else _first_host(env["SLURM_STEP_NODELIST"])
    job, step = int(env["SLURM_JOB_ID"]), int(env["SLURM_STEP_ID"])
    return Place(
        rank=int(env["SLURM_PROCID"]),
        size=int(env["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(env["SLURM_LOCALID"]),
        local_size=counts[int(env["SLURM_NODEID"])],
        address=address,
        port=int(env.get("MASTER_PORT") or 20_000 + (7 * job + step) % 10_000),
        launcher_keeps_store=False,
    )


def _first_host(nodes: str) -> str:
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        return listing.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f"the first host of {nodes} can't be found out with scontrol: set MASTER_ADDR"
        ) from None


def connect(place: Place) -> dist.Store:
    """The store that all ranks share; rank 0 keeps it.

    Raises:
        UserError: nobody answers at the meeting point.
    """
    try:
        if place.launcher_keeps_store:
            return _found(place, _store(place, place.port, is_master=False))
        return _store(place, place.port, is_master=place.rank == 0)
    except (OSError, RuntimeError, ValueError) as error:  # DistNetworkError and its like
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        raise UserError(
            f"can't reach {place.address}:{place.port}, where all ranks meet: {reason}; look at "
            "MASTER_ADDR and MASTER_PORT"
        ) from None


def wait_for_all(place: Place, store: dist.Store) -> None:
    """Wait until every rank has come to the store.

    Here, since a signal isn't heard as long as torch waits: of ranks that are stopped while they
    start, one may have ended before it came.

    Raises:
        UserError: not all come.
    """
    store.add(_HERE, 1)
    deadline, pause = time.monotonic() + _COME, 0.01
    while (here := store.add(_HERE, 0)) < place.size:
        if time.monotonic() > deadline:
            raise UserError(
                f"only {here} of {place.size} ranks came to {place.address}:{place.port} within "
                f"{_COME / 60:.0f} minutes: start all of them"
            )
        time.sleep(pause)
        pause = min(0.5, 1.5 * pause)


def _found(place: Place, launchers: dist.Store) -> dist.Store:
    """The store that rank 0 keeps, found through the launcher's.

    torchrun that starts its workers anew does so with its same old store, in which is all that the
    workers before have said; so it serves for nothing else.
    """
    if place.rank == 0:
        store = _store(place, 0, is_master=True)
        launchers.set(_PORT, str(store.port))
        return store
    deadline = time.monotonic() + _COME
    while time.monotonic() < deadline:
        if within(_PATIENCE, lambda: launchers.check([_PORT])):
            with contextlib.suppress(OSError, RuntimeError):  # that of an earlier rank 0
                return _store(place, int(launchers.get(_PORT)), is_master=False, patience=0)
        time.sleep(0.2)
    raise TimeoutError(f"rank 0 has not come within {_COME:.0f} s")


def _store(place: Place, port: int, is_master: bool, patience: float = _PATIENCE) -> dist.TCPStore:
    """Keep a store on this machine, or find the one that is kept at rank 0's.

    Raises:
        OSError: there is no such host, or nobody listens there.
        DistError: it is no store that does.
    """
    if not is_master:
        _wait_for_answer(place.address, port, patience)
    return within(
        _PATIENCE,
        lambda: dist.TCPStore(
            place.address,
            port,
            place.size,
            is_master=is_master,
            timeout=timedelta(seconds=_PATIENCE),
            wait_for_workers=False,
            multi_tenant=True,
        ),
    )


def _wait_for_answer(address: str, port: int, patience: float) -> None:
    """Wait until somebody listens; torch would print pages about it.

    Raises:
        OSError: there is no such host, or nobody does.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            return socket.create_connection((address, port), timeout=5).close()
        except socket.gaierror:
            raise
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def within(seconds: float, function: Callable[[], T]) -> T:
    """What ``function`` returns.

    torch's own limits don't hold for a store that takes a connection, or has one, and is silent.

    Raises:
        TimeoutError: it has not returned within ``seconds``; it goes on in a thread of its own.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(timeout=seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:.0f} s") from None


def choose_interface(place: Place, store: dist.Store) -> None:
    """Tell gloo which network interface leads to the others.

    By itself it takes the one that this host's name resolves to, which is often the loopback.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    names = [name for _, name in socket.if_nameindex()]
    if place.local_size == place.size:
        if "lo" in names:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        return
    own = _own_address_towards(place.address)
    store.set(f"minigpt/address/{place.rank}", own)
    if _is_loopback(own):  # the others meet here; the way to them is the way to one of them
        for rank in reversed(range(place.size)):
            address = store.get(f"minigpt/address/{rank}").decode()
            if address and not _is_loopback(address):
                own = _own_address_towards(address)
                break
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for name in names:
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(any_socket.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == own and name != "lo":
                os.environ["GLOO_SOCKET_IFNAME"] = name


def _own_address_towards(host: str) -> str:
    """This machine's IPv4 address on the way to another; empty where that has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing: it asks for the route
        except OSError:
            return ""
        own: str = probe.getsockname()[0]
        return own


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")
