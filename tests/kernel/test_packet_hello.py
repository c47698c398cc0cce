"""
A hello that does not arrive: the router is answerable for it, and tells both ends that it failed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from harness.ends import ended_by_reset
from harness.forge import ACK, SYN, Segment, send
from harness.lab import Container
from harness.packet_lab import HANDOFF, HELLOS, VERSIONS, House, PacketLab
from harness.sockets import counts

CHALLENGE = "TcpExtTCPChallengeACK"
"""The metric of segments that an established connection did not expect (RFC 5961)."""


@contextmanager
def deaf(container: Container) -> Iterator[None]:
    """
    Have *container* receive no TCP segment with more in it than options.
    """
    rules = "chain in { type filter hook input priority 0; tcp dport 443 meta length > 120 drop; }"
    container.run("nft", f"table inet deaf {{\n{rules}\n}}")
    try:
        yield
    finally:
        container.run("nft", "delete table inet deaf")


@VERSIONS
def test_a_backend_that_does_not_get_the_hello(version: int) -> None:
    """
    It sends its SYN-ACK again, of which the client hears nothing; in time both hear of the end.
    """
    with PacketLab() as lab, House.running(lab, "--connect-timeout", "2") as house:
        with house.dial(version) as client, deaf(house.app):
            name = client.getsockname()[:2]
            client.sendall(HELLOS[version])
            with house.backends[version].take() as end:
                before = counts(lab.world, CHALLENGE)
                again = Segment.expected(end).but(flags=SYN | ACK, seq=-1)
                send(again, house.app, "eth0", lab.host, "br1")

                assert ended_by_reset(client)
                assert ended_by_reset(end)
            assert before == counts(lab.world, CHALLENGE)
        line = house.line(name)

    assert (HANDOFF, "hello_unacknowledged") == (line["handoff"], line["reason"])
