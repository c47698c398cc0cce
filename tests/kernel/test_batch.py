"""
Clients that come at once make their steps together, and each is still served as if it were alone.
"""

import hashlib
import itertools
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from harness.ends import PATIENCE, client_hello, read_all, read_exactly
from harness.loopback import CAPABILITIES, LOOPBACK, Address
from harness.operate import LoneRouter, ask, lone_router, table
from harness.packet_lab import House, PacketLab
from harness.tools import limited

from controller.core.alert import INTERNAL_ERROR, UNRECOGNIZED_NAME, alert

NAMES = "a.example.com", "b.example.com", "c.example.com"
EACH = 14
"""More in all than are accepted together."""

TRUSTED = "127.0.0.2"
"""Whose clients begin with a PROXY header."""

HEADER = b"PROXY TCP4 192.0.2.7 192.0.2.8 4000 443\r\n"


@contextmanager
def stopped(router: LoneRouter) -> Iterator[None]:
    """
    Have the router sleep until the block ends: who comes meanwhile has come at once.
    """
    router.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        router.process.send_signal(signal.SIGCONT)


def dial(router: LoneRouter, source: str, words: bytes) -> socket.socket:
    client = socket.create_connection(router.listen, PATIENCE, (source, 0))
    client.sendall(words)
    return client


def serve(backend: socket.socket, hellos: Sequence[bytes]) -> None:
    """
    Answer as many connections as there are *hellos*, all of which have to come.
    """
    heard = []
    for _ in hellos:
        end, _ = backend.accept()
        with end:
            end.settimeout(PATIENCE)
            heard.append(read_exactly(end, len(hellos[0])))
            end.sendall(hashlib.sha256(heard[-1]).digest())

    assert sorted(hellos) == sorted(heard)


@pytest.mark.parametrize("handoff", ["sockmap", "relay"])
def test_each_of_a_crowd_is_served_as_if_alone(handoff: str, tmp_path: Path) -> None:
    """
    Clients of three names come among others that are to be refused.

    Some come through a trusted sender, some are late with half of their hello; of the refused one
    kind lacks a route, one a backend that is there, and one does not speak TLS.
    """
    with ExitStack() as stack:
        backends = {}
        for name in NAMES:
            backends[name] = stack.enter_context(socket.create_server((LOOPBACK, 0), backlog=64))
            backends[name].settimeout(PATIENCE)
        with socket.create_server((LOOPBACK, 0)) as gone:
            nobody: Address = gone.getsockname()
        flags = ("--handoff", handoff, "--proxy-protocol-from", TRUSTED, "--hello-timeout", "30")
        router = stack.enter_context(lone_router(tmp_path, *flags, prefix=limited(*CAPABILITIES)))
        routes = {name: [backend.getsockname()] for name, backend in backends.items()}
        ask(router.control, table(1, routes | {"gone.example.com": [nobody]}))
        hellos: dict[str, list[bytes]] = {name: [] for name in NAMES}
        good, late, bad = [], [], []
        with stopped(router):
            for turn, name in itertools.product(range(EACH), NAMES):
                hello = client_hello(name)
                hellos[name].append(hello)
                if turn == 1:
                    client = dial(router, LOOPBACK, hello[:50])
                    late.append((client, hello[50:]))
                elif turn % 2:
                    client = dial(router, TRUSTED, HEADER + hello)
                else:
                    client = dial(router, LOOPBACK, hello)
                good.append((stack.enter_context(client), hello))
                if not turn % 5:
                    for words, answer in (
                        (client_hello("gone.example.com"), alert(INTERNAL_ERROR)),
                        (client_hello("other.example.com"), alert(UNRECOGNIZED_NAME)),
                        (b"GET / HTTP/1.1\r\n\r\n", b""),
                    ):
                        client = stack.enter_context(dial(router, LOOPBACK, words))
                        bad.append((client, answer))
        for client, rest in late:
            client.sendall(rest)
        for name, backend in backends.items():
            serve(backend, hellos[name])
        answers = [(hashlib.sha256(hello).digest(), read_exactly(c, 32)) for c, hello in good]
        refusals = [(answer, read_all(client)) for client, answer in bad]

    for expected, answer in answers + refusals:
        assert expected == answer


def test_a_port_that_is_taken_is_passed_over(lab: PacketLab) -> None:
    """
    Where the kernel's own ports are ours as well, others may have those that we would take.

    One of the kernel's choice instead could be a flow's.
    """
    with ExitStack() as stack:
        lab.host.run("sysctl", "-qw", "net.ipv4.ip_local_port_range=1024 65535")
        with lab.host.network():
            for port in range(1024, 1044):
                taken = stack.enter_context(socket.socket())
                taken.bind(("", port))
        house = stack.enter_context(House.running(lab, "--client-ip", "off"))
        ports = []
        for _ in range(3):
            with house.spliced() as (_, end):
                ports.append(end.getpeername()[1])

    # every other one is for a router that takes this one's place
    assert [1044, 1046, 1048] == ports
