"""Where processes listen."""

import contextlib
import os
import re
import socket
import struct
from pathlib import Path


def listening(pid: int) -> set[tuple[str, int]]:
    """Return (address, port) of the TCP and UDP sockets at which a process listens."""
    inodes = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(fd)):
                inodes.add(found[1])
    places = set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        file = Path(f"/proc/{pid}/net/{table}")
        for line in file.read_text().splitlines()[1:] if file.exists() else ():
            fields = line.split()
            if fields[9] in inodes and fields[3] in ("0A", "07"):  # listens; UDP
                address, port = fields[1].split(":")
                places.add((_readable(address), int(port, 16)))
    return places


def _readable(address: str) -> str:
    """Return an address of /proc, which holds 32-bit words in the machine's byte order."""
    words = [int(address[i : i + 8], 16) for i in range(0, len(address), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))
