"""
Every byte, every end and every hello, by packets: from a client in the world to a container.
"""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness.ends import PIECE, Sender, ended_by_reset, read_all, receive_digest, reset
from harness.hello_promises import HelloPromises
from harness.loopback import Product
from harness.packet_lab import HANDOFF, VERSIONS, House, InLab, PacketLab
from harness.proxy_promises import ProxyPromises
from harness.transfer_promises import BLOCK, SIDES, TransferPromises

from controller.core.session import Side

MOVED = "sniroute_forward_bytes_total"


class Transfer(InLab, TransferPromises):
    """
    The promises of every hand-off.
    """

    # the buffers of the two ends, as small as they begin, are all that there is
    queue = 64 * 1024

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def all_by_packets(cls, lab: PacketLab, product: Product) -> Iterator[None]:
        """
        All bytes of the class go by this hand-off, and no flow is left in the kernel.
        """
        yield
        moved = product.counts(MOVED, "handoff")

        assert {HANDOFF} == moved.keys()

        lab.wait_for_no_flow()


class TestTransparent(Transfer):
    """
    With backends that see the client's address.
    """

    client_ip = "auto"


class TestNat(Transfer):
    """
    With backends that see the host's address.
    """

    client_ip = "off"

    # without a backend there is nothing to hand over
    test_a_backend_that_is_gone = None


class TestHello(InLab, HelloPromises):
    """
    The promises about hellos, from backends that may speak before they are spoken to.
    """

    client_ip = "auto"

    # such a backend's connection takes the next hand-off, if it was quick enough
    test_goes_by_this_hand_off = None


class TestProxy(InLab, ProxyPromises):
    """
    The promises about PROXY headers.
    """

    client_ip = "auto"


@pytest.fixture(scope="module", params=["auto", "nat"])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    """
    The product, whose backends see their clients or the host.
    """
    with PacketLab() as lab, House.running(lab, client_ip=request.param) as house:
        yield house


@VERSIONS
@SIDES
def test_bulk_arrives_whole(source: Side, version: int, house: House) -> None:
    """
    256 MiB of either IP version have the same hash at the other end, and are counted.
    """
    size = 256 * PIECE
    with house.spliced(version) as ends:
        name = ends[0].getsockname()[:2]
        sender = Sender(ends[source], size, BLOCK)
        received = receive_digest(ends[source.other])

        assert (size, sender.join()) == received
    line = house.line(name)
    counted = line["bytes_in" if source is Side.CLIENT else "bytes_out"]

    assert size == counted - (line["hello_bytes"] if source is Side.CLIENT else 0)


@VERSIONS
@SIDES
def test_a_half_close_is_one(source: Side, version: int, house: House) -> None:
    """
    After a FIN the other direction goes on, for as long as it likes.
    """
    with house.spliced(version) as ends:
        near, far = ends[source], ends[source.other]
        near.sendall(BLOCK[:1000])
        near.shutdown(socket.SHUT_WR)

        assert BLOCK[:1000] == read_all(far)

        sender = Sender(far, 16 * PIECE, BLOCK)
        received = receive_digest(near)

        assert (16 * PIECE, sender.join()) == received


@VERSIONS
@SIDES
def test_a_reset_is_one(source: Side, version: int, house: House) -> None:
    """
    A RST is one at the other end, also with bytes that nobody has read, and the log says whose.
    """
    for size in (0, 1, 100_000):
        with house.spliced(version) as ends:
            name = ends[0].getsockname()[:2]
            ends[source.other].sendall(BLOCK[:size])
            reset(ends[source])

            assert ended_by_reset(ends[source.other])
        whose = "client" if source is Side.CLIENT else "backend"

        assert f"{whose}_rst" == house.line(name)["reason"]


@VERSIONS
def test_both_directions_at_once(version: int, house: House) -> None:
    """
    64 MiB each way at the same time arrive whole.
    """
    size = 64 * PIECE
    with house.spliced(version) as (client, end), ThreadPoolExecutor(2) as readers:
        up, down = Sender(client, size, BLOCK), Sender(end, size, BLOCK)
        received = list(readers.map(receive_digest, (end, client)))

        assert [(size, up.join()), (size, down.join())] == received
