"""Other users of the machine: which sockets a run opens, and what it makes of what comes in."""

import json
import random
import socket
from datetime import timedelta
from pathlib import Path

from tests.faults.scene import TWO_RANKS, Scene
from tests.helpers.processes import Process, family, ranks
from tests.helpers.runs import steps_logged, steps_saved
from tests.helpers.sockets import listening
from tests.helpers.waiting import wait_until

ENDLESS = ("train.steps=100000", "eval.every_steps=100000", "checkpoint.every_steps=5")
LOOPBACK = "127.0.0.1"


def all_on_loopback(scene: Scene) -> None:
    """No process of ``--nproc 2`` listens where another machine could reach it."""
    launcher, _ = _train(scene)
    found = {address for pid in family(launcher) for address, _ in listening(pid)}
    assert found == {LOOPBACK}, found
    _stop(launcher)


def noise(scene: Scene, chance: random.Random) -> int:
    """Bytes that mean nothing come to every port: the run goes on, or says that a rank is lost."""
    launcher, run = _train(scene)
    ports = {port for pid in family(launcher) for _, port in listening(pid)}
    for port in ports:
        for size in (0, 1, 100, 100_000):
            with socket.socket() as client:
                client.settimeout(10)
                try:
                    client.connect((LOOPBACK, port))
                    client.sendall(chance.randbytes(size))
                except OSError:  # refused, or closed while we write
                    pass
    before = steps_logged(run)
    wait_until(lambda: launcher.code is not None or steps_logged(run) > before + 20, launcher)
    if launcher.code is None:
        _stop(launcher)
    else:
        _check_lost(launcher, run)
    _go_on(scene, run)
    return 4 * len(ports)


FORGED = (
    b"", b"[" * 100_000, b'{"rank": 0, "code": 0, "message": ""}',
    b'{"rank": 0, "code": 1000000000, "message": ""}', b"x" * 1_000_000,
    b'{"rank": 0, "code": 1, "message": "\\u001b[31mred\\u0007"}',
)  # fmt: skip


def forged_failures(scene: Scene) -> int:
    """Somebody writes a failure into the store: the run never ends as if it had been finished."""
    from torch.distributed import TCPStore

    for value in FORGED:
        launcher, run = _train(scene)
        variables = Path(f"/proc/{ranks(launcher)[1]}/environ").read_bytes().split(b"\0")
        (port,) = (int(each[12:]) for each in variables if each.startswith(b"MASTER_PORT="))
        store = TCPStore(LOOPBACK, port, is_master=False, timeout=timedelta(seconds=30))
        for prefix in ("", "minigpt/"):
            store.set(f"{prefix}failure", value)
        assert launcher.wait(120) == 1, launcher.tail
        del store
        _check_lost(launcher, run)
        _go_on(scene, run)
    return len(FORGED)


def _train(scene: Scene) -> tuple[Process, Path]:
    run = scene.place("shared")
    launcher = scene.fork(*scene.go(run, *TWO_RANKS, *ENDLESS), "--nproc", 2)
    wait_until(lambda: steps_saved(run), launcher)
    return launcher, run


def _stop(launcher: Process) -> None:
    launcher.send(15)
    assert launcher.wait() == 75, launcher.tail


def _check_lost(launcher: Process, run: Path) -> None:
    assert launcher.code == 1, launcher.tail
    assert "Traceback" not in launcher.said, launcher.tail
    assert all(c.isprintable() or c == "\n" for c in launcher.said), repr(launcher.tail)
    status = json.loads((run / "status.json").read_text())
    assert (status["status"], status["exit_code"]) == ("failed", 1), status


def _go_on(scene: Scene, run: Path) -> None:
    steps = steps_logged(run) + 3
    code, said = scene.do(*scene.go(run, "checkpoint.every_steps=5", f"train.steps={steps}"))
    assert code == 0, said
    assert f"finished at step {steps}" in said
