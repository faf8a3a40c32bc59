import os
from pathlib import Path

import pytest

from minigpt_cli.core.storage import storage_of

MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
31 27 0:45 / /data rw,noatime shared:1 master:2 - nfs4 server:/export/data rw,vers=4.2
32 27 0:46 /sub /scratch rw - lustre 10.0.0.1@tcp:/scratch rw
33 27 0:47 / /mnt rw - nfs
broken
"""
DISK, NFS, LUSTRE, BROKEN = (
    os.makedev(*number) for number in ((254, 0), (0, 45), (0, 46), (0, 47))
)


def machine(folder: Path, boot: str, mounts: str = MOUNTS) -> Path:
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/sys/kernel/random").mkdir(parents=True)
    (folder / "proc/self/mountinfo").write_text(mounts)
    (folder / "proc/sys/kernel/random/boot_id").write_text(boot + "\n")
    return folder


@pytest.mark.parametrize(
    ("devices", "shared"),
    [
        ({NFS}, True),
        ({LUSTRE}, True),
        ({DISK}, False),
        ({BROKEN}, False),
        ({NFS, DISK}, False),
        ({12345}, False),
        (set(), False),
    ],
)
def test_machines_share_only_network_file_systems(tmp_path: Path, devices: set[int], shared: bool):
    mounts = MOUNTS.replace("0:45", "0:99")  # the other machine numbers it otherwise
    here, there = machine(tmp_path / "a", "boot-a"), machine(tmp_path / "b", "boot-b", mounts)
    others = {os.makedev(0, 99) if each == NFS else each for each in devices}
    assert (storage_of(devices, here) == storage_of(others, there)) is shared


def test_names(tmp_path: Path):
    root = machine(tmp_path, "boot-a")
    assert storage_of({NFS}, root).name == "nfs4 server:/export/data"
    assert storage_of({LUSTRE}, root).name == "lustre 10.0.0.1@tcp:/scratch"
    assert storage_of({DISK}, root) == storage_of({12345}, root)
    assert storage_of({DISK}, root).boot == "boot-a"
    assert storage_of({DISK}, tmp_path / "missing").boot == ""


def test_this_machine(tmp_path: Path):
    found = storage_of({tmp_path.stat().st_dev})
    assert found == storage_of({tmp_path.stat().st_dev})
    assert found.name
