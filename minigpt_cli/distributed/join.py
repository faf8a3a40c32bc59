"""Meet the other ranks of a run at the store that all share, and follow the launcher.

torch is imported only by a process that connects.
"""

import contextlib
import fcntl
import ipaddress
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from minigpt_cli.core.env_variables import env_int
from minigpt_cli.core.errors import EXIT_STOPPED, UserError, first_line
from minigpt_cli.distributed.rank_info import LOOPBACK, RankInfo

if TYPE_CHECKING:
    from torch.distributed import Store, TCPStore

T = TypeVar("T")
LAUNCHER_PID = "MINIGPT_LAUNCHER_PID"  # environment variable: process id of ``--nproc``'s launcher
STORE_FD = "MINIGPT_STORE_FD"  # environment variable: rank 0's listening socket, from the launcher
ANSWER_SECONDS = 5.0  # for the store to answer a rank that is ending
_CONNECT_SECONDS = 40.0  # where nobody answers, that is an error within a minute
_ARRIVE_SECONDS = 600.0  # how much later than the first rank the last one may come
_ARRIVED = "minigpt/arrived"  # key: number of ranks that have connected
_ENDED = "minigpt/ended"  # key: number of ranks that are ending
_PORT = "minigpt/port"  # key in torchrun's store: port of rank 0's own store


class Session:
    """What this process knows of the other ranks, before any ``World`` and beside it."""

    info: RankInfo | None = None
    store: "Store | None" = None
    launched = False  # whether ``--nproc`` started this process


session = Session()


def own_rank() -> int:
    """Return this process's rank; 0 in a single process and before it has joined."""
    return session.info.rank if session.info else 0


def is_rank0() -> bool:
    """Return whether this process is rank 0, which speaks for all, or the only process."""
    return own_rank() == 0


def connect(info: RankInfo) -> "Store":
    """Return the store that all ranks share; rank 0 hosts it.

    Raises:
        UserError: nobody answers there, or rank 0 can't listen there.
    """
    try:
        if info.agent_store:
            return _connect_through_agent(info)
        if info.rank == 0:
            return _host_store(info, info.port)
        return _open_store(LOOPBACK if info.one_machine else info.address, info.port)
    except (OSError, RuntimeError, ValueError) as error:  # DistNetworkError is a RuntimeError
        reason = getattr(error, "strerror", None) or first_line(error)
        hint = "" if session.launched else "; check MASTER_ADDR and MASTER_PORT"
        raise UserError(
            f"can't reach {info.address}:{info.port}, where all ranks meet: {reason}{hint}"
        ) from None


def _connect_through_agent(info: RankInfo) -> "Store":
    """Find rank 0's store through torchrun's.

    When torchrun restarts the workers, its store still holds all that the earlier ones wrote. So
    torchrun's store carries only the port of rank 0's.
    """
    agent = _open_store(info.address, info.port)
    if info.rank == 0:
        store = _host_store(info, 0)
        agent.set(_PORT, str(store.port))
        return store
    deadline = time.monotonic() + _ARRIVE_SECONDS
    while time.monotonic() < deadline:
        if call_with_timeout(_CONNECT_SECONDS, lambda: agent.check([_PORT])):
            # An error here: it is still the port of an earlier rank 0.
            with contextlib.suppress(OSError, RuntimeError, ValueError, OverflowError):
                address = LOOPBACK if info.one_machine else info.address
                return _open_store(address, int(agent.get(_PORT)), seconds=0)
        time.sleep(0.2)
    raise TimeoutError(f"rank 0 has not come within {_ARRIVE_SECONDS:.0f} s")


def _host_store(info: RankInfo, port: int) -> "TCPStore":
    """Host the store on this machine. TCPStore by itself would listen on all addresses.

    Args:
        port: 0 for any free one.
    """
    if os.environ.get(STORE_FD):
        listener = socket.socket(fileno=env_int(STORE_FD))
        del os.environ[STORE_FD]
    elif info.one_machine:
        listener = socket.create_server((LOOPBACK, port), backlog=socket.SOMAXCONN)
    else:
        socket.getaddrinfo(info.address, port)  # torch would try for long, and print lines
        return _tcp_store(info.address, port, is_master=True)
    port = listener.getsockname()[1]
    return _tcp_store(LOOPBACK, port, is_master=True, master_listen_fd=listener.detach())


def _open_store(address: str, port: int, seconds: float = _CONNECT_SECONDS) -> "TCPStore":
    """Connect to a store, once something listens there; torch would print pages until then.

    Raises:
        OSError: there is no such host, or nothing listens within ``seconds``.
        DistError: what listens is no store.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=5).close()
            break
        except socket.gaierror:
            raise
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)
    return _tcp_store(address, port)


def _tcp_store(address: str, port: int, **options: object) -> "TCPStore":
    from torch.distributed import TCPStore

    # The launcher listens from the start, but rank 0 answers only when it has imported torch.
    seconds = _ARRIVE_SECONDS if session.launched else _CONNECT_SECONDS
    return call_with_timeout(
        seconds,
        lambda: TCPStore(
            address,
            port,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            **options,
        ),
    )


def wait_for_all(info: RankInfo, store: "Store") -> None:
    """Wait until every rank has connected to the store.

    It waits in Python, because a signal isn't handled while torch waits, and a rank that was
    stopped while it started never comes.

    Raises:
        UserError: not all ranks come.
    """
    store.add(_ARRIVED, 1)
    deadline, pause = time.monotonic() + _ARRIVE_SECONDS, 0.01
    while (arrived := store.add(_ARRIVED, 0)) < info.size:
        if time.monotonic() > deadline:
            raise UserError(
                f"only {arrived} of {info.size} ranks came to {info.address}:{info.port} within "
                f"{_ARRIVE_SECONDS / 60:.0f} minutes: start all of them"
            )
        time.sleep(pause)
        pause = min(0.5, 1.5 * pause)


def leave_world(patience: float = 0) -> None:
    """Part from the other ranks at the end; rank 0, which hosts the store, goes last.

    Args:
        patience: seconds that rank 0 waits for the others.
    """
    info, store = session.info, session.store
    if info is None or store is None:
        return
    with contextlib.suppress(Exception):  # the exit code is decided
        call_with_timeout(ANSWER_SECONDS, lambda: store.add(_ENDED, 1))
        deadline = time.monotonic() + patience
        while info.rank == 0 and time.monotonic() < deadline:
            if store.add(_ENDED, 0) == info.size:
                return
            time.sleep(0.02)


def call_with_timeout(seconds: float, function: Callable[[], T]) -> T:
    """Return ``function()``, called in a thread; a signal is handled meanwhile.

    torch's own time limits don't cover a store that accepts a connection and stays silent.

    Raises:
        TimeoutError: it has not returned within ``seconds``; the thread goes on.
    """
    from concurrent.futures import Future  # here: it takes a tenth of the time of --help

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


def choose_interface(info: RankInfo, store: "Store") -> None:
    """Set the network interface that gloo uses, and NCCL on one machine, unless the user has.

    By itself gloo takes the interface that this host's name resolves to, often the loopback.
    """
    names = [name for _, name in socket.if_nameindex()]
    if info.one_machine:
        if "lo" in names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
        return
    own = _own_address_towards(info.address)
    store.set(f"minigpt/address/{info.rank}", own)
    if not _is_remote(own):  # this is rank 0's machine: take the interface towards another rank
        addresses = (
            store.get(f"minigpt/address/{rank}").decode("ascii", "replace")
            for rank in range(info.size)
        )
        own = next((_own_address_towards(each) for each in addresses if _is_remote(each)), own)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for name in names:
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(any_socket.fileno(), 0x8915, request)  # SIOCGIFADDR
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == own and name != "lo":
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def _own_address_towards(host: str) -> str:
    """Return this machine's IPv4 address on the route to a host; empty if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing: it looks up the route
        except OSError:
            return ""
        own: str = probe.getsockname()[0]
        return own


def _is_remote(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return not ipaddress.IPv4Address(address).is_loopback
    return False


def follow_launcher() -> None:
    """Stop this process when the launcher (``--nproc`` or torchrun) that started it has gone.

    Does nothing in a process that neither started. Call it once, before torch is imported.

    Raises:
        UserError: the launcher's process id is no number.
    """
    launcher = env_int(LAUNCHER_PID, 0)
    os.environ.pop(LAUNCHER_PID, None)  # not for processes that this one starts
    session.launched = launcher > 0
    if session.launched:
        follow_parent(launcher)
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        follow_parent(os.getppid())


def follow_parent(parent: int, grace_seconds: float = 60) -> None:
    """Stop this process soon after process ``parent`` has gone, however that one ended.

    A daemon thread looks twice a second whether ``parent`` is still our parent. When it isn't, also
    when it had gone before this call, the thread sends SIGTERM to this process, which saves and
    exits. If it hasn't within ``grace_seconds``, the thread ends it with exit code 75.
    """

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_seconds)
        os._exit(EXIT_STOPPED)

    threading.Thread(target=follow, name="follow-parent", daemon=True).start()
