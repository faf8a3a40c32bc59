"""HOST:PORT: what is refused at once, and what is found."""

import contextlib
import socket
import time

import pytest

from minigpt_cli.core.errors import UserError
from minigpt_cli.distributed.endpoint import Endpoint, find, parse

ELSEWHERE = "192.0.2.1"  # reserved for documentation: no machine has it


def never() -> bool:
    return False


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("node1:29400", ("node1", 29400)),
        ("10.0.0.1:1", ("10.0.0.1", 1)),
        ("gpu-3.cluster.example:65535", ("gpu-3.cluster.example", 65535)),
        ("[fe80::1%eth0]:29400", ("fe80::1%eth0", 29400)),
    ],
)
def test_host_and_port_are_read(text: str, expected: tuple[str, int]):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "node1", "node1:", ":29400", "node1:x", "node1:0", "node1:65536", "fe80::1:29400",
             "tcp://node1:29400", "node1:29400/run", "node 1:29400", "a:1:2"],
)  # fmt: skip
def test_what_is_no_host_and_port_is_refused(text: str):
    with pytest.raises(UserError, match=r"must be HOST:PORT.*node1:29400"):
        find(text, 0, never)


def test_a_host_that_has_no_address_is_refused_at_once():
    with pytest.raises(UserError, match=r"no-such-node\.invalid:29400: can't find the host"):
        find("no-such-node.invalid:29400", 60, never)


def test_every_address_of_this_machine_is_here():
    names = ["localhost", "127.0.0.1"]
    with contextlib.suppress(OSError):  # some containers don't know themselves
        socket.gethostbyname(socket.gethostname())
        names.append(socket.gethostname())
    for host in names:
        assert find(f"{host}:29400", 0, never) == Endpoint(host, 29400, True, host)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_an_address_that_every_machine_has_is_refused(host: str):
    with pytest.raises(UserError, match="means every machine"):
        find(f"{host}:29400", 0, never)


def test_an_address_of_another_machine_where_nobody_answers_is_refused():
    with pytest.raises(UserError, match=r"nobody answers there .* isn't 192\.0\.2\.1; run the"):
        find(f"{ELSEWHERE}:29400", 0, never)


def test_waiting_for_somebody_to_answer_ends_with_a_signal():
    begun = time.monotonic()
    found = find(f"{ELSEWHERE}:29400", 600, lambda: time.monotonic() > begun + 0.5)
    assert not found.is_here
