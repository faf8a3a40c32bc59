"""Threads that work with tensors use the rank's device."""

import ast
import threading

import pytest
import torch

from minigpt_cli.core.threads import device_thread
from tests.helpers.processes import ROOT


def test_a_thread_uses_its_device(monkeypatch: pytest.MonkeyPatch):
    chosen = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append((threading.get_ident(), device))
    )
    for device in (torch.device("cuda", 1), torch.device("cpu")):
        with device_thread("test", device) as pool:
            thread = pool.submit(threading.get_ident).result()
        assert thread != threading.get_ident()
        assert chosen == [(thread, device)] * (device.type == "cuda")
        chosen.clear()


def test_all_pools_use_the_device():
    """Encoding, hashing and drawing weights use no GPU; core/threads.py makes all other pools."""
    makers = {
        path.relative_to(ROOT / "minigpt_cli").as_posix()
        for path in (ROOT / "minigpt_cli").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "ThreadPoolExecutor"
    }
    assert makers == {
        "core/threads.py",
        "data/verification.py",
        "model/random_rows.py",
        "prepare/encode.py",
    }
