"""
Packets that others send on the addresses of a flow: it is no easier to end or to garble than TCP.

Whoever forges them knows both ends' addresses and ports, but not where in the stream they are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from harness.ends import PIECE, Sender, ended_by_reset, read_exactly, receive_digest
from harness.forge import ACK, FIN, PSH, RST, SYN, Segment, send
from harness.lab import Container
from harness.machines import Here
from harness.packet_lab import HANDOFF, VERSIONS, Ends, House, PacketLab
from harness.transfer_promises import BLOCK, SIDES

from controller.core.session import Side

FAR_OFF = 1 << 30
"""More than any window."""

NEAR = 100
"""Less than any window."""

FORGED: dict[str, Callable[[Segment], Segment]] = {
    "RST": lambda s: s.but(flags=RST, seq=FAR_OFF),
    "RST of the past": lambda s: s.but(flags=RST, seq=-NEAR),
    "RST in the window": lambda s: s.but(flags=RST, seq=NEAR),
    "RST and ACK in the window": lambda s: s.but(flags=RST | ACK, seq=NEAR),
    "FIN": lambda s: s.but(flags=FIN | ACK, seq=FAR_OFF),
    "FIN of the past": lambda s: s.but(flags=FIN | ACK, seq=-NEAR),
    "FIN without ACK": lambda s: s.but(flags=FIN),
    "FIN for what was never sent": lambda s: s.but(flags=FIN | ACK, ack=FAR_OFF),
    "SYN": lambda s: s.but(flags=SYN, seq=FAR_OFF),
    "SYN in the window": lambda s: s.but(flags=SYN),
    "SYN-ACK": lambda s: s.but(flags=SYN | ACK),
    "fragment": lambda s: s.but(seq=FAR_OFF, fragment=True),
    "data": lambda s: s.but(flags=ACK | PSH, seq=FAR_OFF, payload=b"forged"),
    "data of the past": lambda s: s.but(flags=ACK | PSH, seq=-NEAR, payload=b"forged"),
    "data without ACK": lambda s: s.but(flags=PSH, payload=b"forged"),
    "data for what was never sent": lambda s: s.but(ack=FAR_OFF, payload=b"forged"),
    "ACK of what was never sent": lambda s: s.but(ack=FAR_OFF),
}
"""What is made of the segment that an end would send next."""

BEYOND: dict[str, Callable[[Segment], Segment]] = {
    "without ACK": lambda s: s.but(flags=PSH, seq=NEAR, payload=b"forged"),
    "for what was never sent": lambda s: s.but(seq=NEAR, ack=FAR_OFF, payload=b"forged"),
}
"""Data beyond what an end has sent, of which its other end takes nothing."""

FINAL: dict[str, tuple[Side, Callable[[Segment], Segment], str]] = {
    "RST of the client": (Side.CLIENT, lambda s: s.but(flags=RST), "client_rst"),
    "RST of the backend": (Side.BACKEND, lambda s: s.but(flags=RST), "backend_rst"),
    # of a backend's, the host's bridge may wait for the rest
    "fragment": (Side.CLIENT, lambda s: s.but(seq=NEAR, fragment=True), "fragment"),
}
"""Whose segment ends a flow, and the reason in the log."""


@dataclass(frozen=True, slots=True)
class Street:
    """
    The product, and a container that is neither end of its flows.
    """

    house: House
    stranger: Container

    def beside(self, end: Side) -> tuple[Here, str, Here, str]:
        """
        Whence *end* is heard of: a machine and its device, and the host's device that it leads to.
        """
        lab = self.house.lab
        if end is Side.CLIENT:
            return lab.world, "eth0", lab.host, "out0"
        return self.stranger, "eth0", lab.host, "br1"


@pytest.fixture(scope="module", params=["auto", "nat"])
def street(request: pytest.FixtureRequest) -> Iterator[Street]:
    """
    The product, whose backends see their clients or the host.
    """
    with PacketLab() as lab, House.running(lab, client_ip=request.param) as house:
        yield Street(house, lab.container(3))


def talk(ends: Ends) -> None:
    """
    Have something pass each way.
    """
    for near, far in (ends, ends[::-1]):
        near.sendall(BLOCK[:1000])

        assert BLOCK[:1000] == read_exactly(far, 1000)


def transfer(ends: Ends) -> None:
    """
    Send a piece each way up to the FIN, one after the other, and check that it arrives whole.
    """
    for near, far in (ends, ends[::-1]):
        sender = Sender(near, PIECE, BLOCK)
        received = receive_digest(far)

        assert (PIECE, sender.join()) == received


@VERSIONS
@SIDES
def test_what_is_forged_does_nothing(source: Side, version: int, street: Street) -> None:
    """
    A flow goes on, whole, whatever is forged with numbers that are not the next ones.

    All that is counted is what its ends have sent.
    """
    with street.house.joined(version) as ends:
        name = ends[0].getsockname()[:2]
        talk(ends)
        for forged in FORGED.values():
            send(forged(Segment.expected(ends[source])), *street.beside(source))
            talk(ends)
        transfer(ends)
    line = street.house.line(name)
    size = (1 + len(FORGED)) * 1000 + PIECE

    assert (HANDOFF, size) == (line["handoff"], line["bytes_in"] - line["hello_bytes"]), line
    assert (size, "client_fin") == (line["bytes_out"], line["reason"]), line


@VERSIONS
@SIDES
@pytest.mark.parametrize("beyond", BEYOND.values(), ids=BEYOND.keys())
def test_a_forged_segment_hides_no_end(
    beyond: Callable[[Segment], Segment], source: Side, version: int, street: Street
) -> None:
    """
    After data that nobody takes both ends close, and that is all that is counted.
    """
    with street.house.joined(version) as ends:
        name = ends[0].getsockname()[:2]
        talk(ends)
        send(beyond(Segment.expected(ends[source])), *street.beside(source))
        ends[0].close()

        assert b"" == ends[1].recv(1)

    line = street.house.line(name)

    assert (1000, 1000) == (line["bytes_in"] - line["hello_bytes"], line["bytes_out"]), line
    assert "client_fin" == line["reason"], line


@VERSIONS
@pytest.mark.parametrize("final", FINAL.values(), ids=FINAL.keys())
def test_nobody_speaks_for_an_end_from_elsewhere(
    final: tuple[Side, Callable[[Segment], Segment], str], version: int, street: Street
) -> None:
    """
    What ends a flow when it comes from where an end is does nothing from where the other one is.
    """
    source, forge, reason = final
    with street.house.joined(version) as ends:
        name = ends[0].getsockname()[:2]
        talk(ends)
        send(forge(Segment.expected(ends[source])), *street.beside(source.other))
        talk(ends)
        send(forge(Segment.expected(ends[source])), *street.beside(source))

        assert ended_by_reset(ends[source.other])

    line = street.house.line(name)

    assert (HANDOFF, reason) == (line["handoff"], line["reason"])
