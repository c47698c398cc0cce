"""
What a client says right behind its hello, before anybody has answered, arrives like the rest.

Such bytes may have been acknowledged by the router before packets are translated.  So either it
leaves the connection to another hand-off, or nothing of it has to be sent again.
"""

import hashlib
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from harness.ends import PIECE, read_exactly, receive_digest
from harness.packet_lab import HANDOFF, HELLOS, PATIENCE, VERSIONS, House, PacketLab
from harness.sockets import counts, info
from harness.transfer_promises import BLOCK

ROUNDS = 10
KIB = 1024

POUR_SECONDS = 0.2
POUR_LIMIT = 8 * PIECE

SLACK = 3
"""Segments that ROUNDS connections may send again on a busy machine, where nothing is lost: TCP
takes a reader that waits for a processor for a loss."""


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    """
    The product, and a way round it.
    """
    with PacketLab() as lab, House.running(lab) as house:
        for version in (4, 6):
            lab.reach_directly(version, house.app)
        yield house


@dataclass(frozen=True, slots=True)
class Outcome:
    """
    How a connection with early data went: by what, and what its client had to send again.
    """

    handoff: str
    refused_by: list[str]
    retransmits: int


def speak(house: House, client: socket.socket, version: int, early: bytes) -> int:
    """
    Say hello with *early* behind it, have all of it heard, and count what was sent again.
    """
    with ThreadPoolExecutor(1) as writer:
        # one write, so that all of it comes as close as it can
        writing = writer.submit(client.sendall, HELLOS[version] + early)
        with house.backends[version].accept() as end:
            end.settimeout(PATIENCE)

            assert early == read_exactly(end, len(early))

            writing.result()
            end.sendall(b"and back")

            assert b"and back" == read_exactly(client, 8)

            client.sendall(b"later")

            assert b"later" == read_exactly(end, 5)

            return info(client).total_retrans


def by_the_product(house: House, version: int, early: bytes) -> Outcome:
    """
    Speak through the product.
    """
    with house.dial(version) as client:
        name = client.getsockname()[:2]
        retransmits = speak(house, client, version, early)
    line = house.line(name)
    return Outcome(line["handoff"], line.get("refused_by", []), retransmits)


def directly(house: House, version: int, early: bytes) -> int:
    """
    Speak over a connection that is only routed.
    """
    with house.dial(version, to=(house.app.address[version], 443)) as client:
        return speak(house, client, version, early)


@VERSIONS
@pytest.mark.parametrize("size", [1, KIB, 2 * KIB, 4 * KIB, 16 * KIB, 64 * KIB, 1024 * KIB])
def test_early_data_arrives_whole(size: int, version: int, house: House) -> None:
    """
    However much it is, all of it arrives, once, and is not sent more often than over a wire.
    """
    early = BLOCK[:size]
    machines = (house.lab.world, house.lab.host, house.app)

    direct = sum(directly(house, version, early) for _ in range(ROUNDS))
    resets = [counts(machine, "TcpOutRsts") for machine in machines]
    outcomes = [by_the_product(house, version, early) for _ in range(ROUNDS)]

    assert resets == [counts(machine, "TcpOutRsts") for machine in machines]
    assert sum(o.retransmits for o in outcomes) <= direct + SLACK, outcomes
    for outcome in outcomes:
        reasons = [r for r in outcome.refused_by if r.startswith(f"{HANDOFF}: ")]
        expected = [] if outcome.handoff == HANDOFF else [f"{HANDOFF}: early_data"]

        assert expected == reasons


@VERSIONS
@pytest.mark.parametrize("gap", [0, 0.0002, 0.001, 0.01])
def test_an_upload_that_began_with_the_hello_arrives_whole(
    gap: float, version: int, house: House
) -> None:
    """
    A client that writes on and on, a piece each *gap* seconds, loses nothing at the hand-over.
    """
    for _ in range(ROUNDS):
        with house.dial(version) as client, ThreadPoolExecutor(1) as writer:
            writing = writer.submit(pour, client, HELLOS[version], gap)
            with house.backends[version].accept() as end:
                end.settimeout(PATIENCE)

                received = receive_digest(end)

                assert writing.result() == received


def pour(client: socket.socket, hello: bytes, gap: float) -> tuple[int, str]:
    """
    Write the hello and then pieces of 4 KiB; tell how many bytes, and their SHA-256.
    """
    digest, size, until = hashlib.sha256(), 0, time.monotonic() + POUR_SECONDS
    client.sendall(hello)
    while time.monotonic() < until and size < POUR_LIMIT:
        piece = BLOCK[size % PIECE :][: 4 * KIB]
        client.sendall(piece)
        digest.update(piece)
        size += len(piece)
        if gap:
            time.sleep(gap)
    client.shutdown(socket.SHUT_WR)
    return size, digest.hexdigest()


@VERSIONS
def test_a_client_that_waits_is_handed_over(version: int, house: House) -> None:
    """
    A client that says nothing but its hello before it is answered, as most do, is handed over.
    """
    for _ in range(ROUNDS):
        with house.spliced(version) as (client, end):
            end.sendall(b"hello yourself")

            assert b"hello yourself" == read_exactly(client, 14)
