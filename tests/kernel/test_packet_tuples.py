"""
Addresses and ports that come back: the next connection on them is one of its own.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count

import pytest
from harness import swarm
from harness.ends import client_hello, ended_by_reset, read_all, read_exactly, reset
from harness.lab import CLIENT, route
from harness.packet_lab import (
    HANDOFF,
    VERSIONS,
    Ends,
    House,
    PacketLab,
)
from harness.sockets import vanish
from harness.tools import wait_for

ROUNDS = 5

PORTS = count(20000)
"""Ports for clients, each for one test: no TIME_WAIT of another one is met."""


@pytest.fixture(scope="module", params=["auto", "nat"])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    """
    The product, whose backends see their clients or the host.
    """
    with PacketLab() as lab, House.running(lab, client_ip=request.param) as house:
        yield house


def talk(ends: Ends, word: bytes) -> None:
    """
    Have *word* pass each way.
    """
    for near, far in (ends, ends[::-1]):
        near.sendall(word)

        assert word == read_exactly(far, len(word))


def end_by_backend(client: socket.socket, end: socket.socket) -> None:
    end.close()

    assert b"" == read_all(client)

    client.close()


def end_by_client_reset(client: socket.socket, end: socket.socket) -> None:
    reset(client)

    assert ended_by_reset(end)


def end_by_backend_reset(client: socket.socket, end: socket.socket) -> None:
    reset(end)

    assert ended_by_reset(client)


@VERSIONS
@pytest.mark.parametrize("over", [end_by_backend, end_by_client_reset, end_by_backend_reset])
def test_addresses_are_used_again_at_once(
    over: Callable[[socket.socket, socket.socket], None], version: int, house: House
) -> None:
    """
    A client may connect from the port of its last connection as soon as that has ended.
    """
    source = CLIENT[version], next(PORTS)
    for number in range(ROUNDS):
        with house.joined(version, source=source) as ends:
            talk(ends, f"connection {number}".encode())
            over(*ends)
    wait_for("all in the log", lambda: len(house.lines(source)) == ROUNDS)

    assert [HANDOFF] * ROUNDS == [line["handoff"] for line in house.lines(source)]


@VERSIONS
def test_a_client_that_was_rebooted_is_served(version: int, house: House) -> None:
    """
    A client that knows nothing of its open connection may have another one on the same port.

    The backend's end of the first one is reset, as it is without a router.
    """
    source = CLIENT[version], next(PORTS)
    with house.joined(version, source=source) as (client, end):
        talk((client, end), b"before the power went")
        vanish(client)
        with house.joined(version, source=source) as others:
            talk(others, b"after it came back")

        assert ended_by_reset(end)


@VERSIONS
def test_a_backend_of_a_client_that_is_gone_is_reset(version: int, house: House) -> None:
    """
    An end that speaks to a client that has forgotten it is reset, not left to wait.
    """
    with house.joined(version) as (client, end):
        talk((client, end), b"before the power went")
        vanish(client)
        end.sendall(b"anybody there?")

        assert ended_by_reset(end)


# --- many ---


@dataclass(frozen=True, slots=True)
class Run:
    """
    Many quick connections to one backend, and how they end.
    """

    port: int
    client_ip: str
    closes_first: bool
    resets: bool
    ports: range

    @property
    def host(self) -> str:
        """
        The name of the backend.
        """
        return f"p{self.port}.test"


RUNS = (
    Run(1443, "auto", closes_first=True, resets=False, ports=range(10000, 15000)),
    Run(2443, "nat", closes_first=False, resets=False, ports=range(15000, 20000)),
    Run(3443, "auto", closes_first=False, resets=True, ports=range(40000, 45000)),
    Run(4443, "nat", closes_first=False, resets=True, ports=range(45000, 50000)),
)


def left_on_the_host(lab: PacketLab) -> list[str]:
    """
    List what the host still knows of connections: its sockets, and netfilter's entries.
    """
    sockets = lab.host.run("ss", "-Htan", "state", "connected").splitlines()
    tracks = lab.host.run("cat", "/proc/net/nf_conntrack").splitlines()
    # neither those that ask for metrics nor those of the router's own trial
    return [
        line
        for line in (*sockets, *(line for line in tracks if " tcp " in line))
        if not any(word in line for word in (":9443", "dport=9443", "127.0.0.1"))
    ]


def test_many_connections_leave_nothing() -> None:
    """
    After 20,000 connections, ended by FIN and by RST, the host holds nothing of them.

    No flow is left when their quarantine is over, no socket, no port, and no entry of conntrack.
    """
    with PacketLab() as lab, ExitStack() as stack:
        app = lab.container(2)
        routes = ""
        for run in RUNS:
            serving = swarm.serving(app, app.address[4], run.port, closes_first=run.closes_first)
            stack.enter_context(serving)
            routes += route(run.host, app.address[4], run.port, client_ip=run.client_ip)
        sniroute = stack.enter_context(lab.product("--no-access-log", routes=routes))
        router = sniroute.router()
        before = router.num_fds()
        tallies = [
            swarm.ask(
                lab.world,
                lab.front,
                client_hello(run.host),
                CLIENT[4],
                run.ports,
                resets=run.resets,
            )
            for run in RUNS
        ]
        wait_for("all descriptors closed", lambda: router.num_fds() <= before)
        lab.wait_for_no_flow()
        moved = sniroute.metric("sniroute_forward_bytes_total")
        by_packets = sniroute.metric("sniroute_forward_bytes_total", handoff=HANDOFF)
        refused = sniroute.metric("sniroute_handoff_refusals_total")

        assert [0] * len(RUNS) == [tally.failed for tally in tallies], tallies
        assert (moved, 0) == (by_packets, refused)
        assert [] == left_on_the_host(lab)
