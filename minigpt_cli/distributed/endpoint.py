"""HOST:PORT, where the launchers of several nodes meet: read, resolved and tried."""

import ipaddress
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from minigpt_cli.core.errors import UserError


@dataclass(frozen=True)
class Endpoint:
    host: str
    port: int  # 0: any free one
    is_here: bool = True
    """HOST is an address of this machine, which so is the one to listen."""
    own_address: str = ""
    """An address at which the other nodes reach this machine."""

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


ONE_NODE = Endpoint("127.0.0.1", 0, own_address="127.0.0.1")


def parse(text: str) -> tuple[str, int]:
    """Read ``HOST:PORT`` or ``[IPv6]:PORT``.

    Raises:
        UserError: it is something else.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([\w.-]+)):(\d{1,5})", text)
    if not match or not 0 < int(match[3]) < 2**16:
        raise UserError(
            f"--rdzv-endpoint {text}: must be HOST:PORT, the name or address of one of the nodes "
            "and a free port on it, for example node1:29400"
        )
    return match[1] or match[2], int(match[3])


def find(text: str, seconds: float, stopped: Callable[[], bool]) -> Endpoint:
    """Find the endpoint, and wait up to ``seconds`` until something listens there, unless it is on
    this machine or until ``stopped()``.

    Raises:
        UserError: HOST has no address, or it isn't this machine and nobody answers at PORT.
    """
    host, port = parse(text)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--rdzv-endpoint {text}: can't find the host {host} ({reason}); give the name or "
            "address of one of the nodes, as all of them know it"
        ) from None
    addresses = [(family, str(address[0])) for family, _, _, _, address in found]
    if any(ipaddress.ip_address(address).is_unspecified for _, address in addresses):
        raise UserError(
            f"--rdzv-endpoint {text}: {host} means every machine; give the address of one node"
        )
    if any(_is_here(family, address) for family, address in addresses):
        return Endpoint(host, port, is_here=True, own_address=host)
    deadline = time.monotonic() + seconds
    while not stopped():
        try:
            with socket.create_connection((host, port), timeout=2) as connection:
                return Endpoint(host, port, False, own_address=connection.getsockname()[0])
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"--rdzv-endpoint {text}: nobody answers there ({error.strerror or error}), "
                    f"and this machine ({socket.gethostname()}) isn't {host}; run the command on "
                    f"{host} as well, and see that the port is free and open there"
                ) from None
        time.sleep(0.5)
    return Endpoint(host, port, is_here=False)


def _is_here(family: int, address: str) -> bool:
    """Whether it is an address of this machine: only these can be bound."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True
