"""Whether several machines see the same storage."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

# File systems that many machines mount. Their source names the server and the volume.
_SHARED = ("beegfs", "ceph", "cifs", "gpfs", "lustre", "nfs", "nfs4", "smb3", "wekafs")


@dataclass(frozen=True)
class Storage:
    """Where files lie.

    Attributes:
        name: of the server and its volume, or of this machine if no other one sees the files.
        boot: of this machine, where its name is used; it differs after each restart.
    """

    name: str
    boot: str = ""


def storage_of(devices: set[int], root: Path = Path("/")) -> Storage:
    """Return the storage of some files, equal on machines that see the same files.

    Args:
        devices: the numbers of their file systems (``st_dev``).
        root: what holds ``proc``.
    """
    if len(devices) == 1:
        (device,) = devices
        number = f"{os.major(device)}:{os.minor(device)}"
        for line in _read(root / "proc/self/mountinfo").splitlines():
            # 36 35 98:0 /root /mount/point rw,noatime master:1 - nfs4 server:/volume rw
            mount, _, filesystem = line.partition(" - ")
            if mount.split()[2:3] == [number]:
                kind, source, *_ = [*filesystem.split(), "", ""]
                if kind in _SHARED and source:
                    return Storage(f"{kind} {source}")
    return Storage(platform.node(), _read(root / "proc/sys/kernel/random/boot_id").strip())


def _read(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
