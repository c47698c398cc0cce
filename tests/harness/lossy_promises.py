"""
What holds on a bad network, by every hand-off: kernel/ runs these, on a machine of their own.
"""

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import ClassVar, Final

import pytest

from controller.core.session import Side
from harness.ends import NAME, PIECE, Backend, Sender, connection, read_all
from harness.loopback import Product, router
from harness.machines import CLIENT_ADDRESS, HOST_ADDRESS, Machine, join
from harness.transfer_promises import BLOCK, SIDES

CONNECTIONS: Final = 4
OUTAGES: Final = 8
UP, DOWN = 0.4, 0.25
"""Seconds between outages, and of one: longer than TCP's shortest retransmission timeout."""

SIZE: Final = 8 * PIECE


class LossyPromises:
    """
    The promises; a subclass names the hand-off.
    """

    handoff: ClassVar[str]

    @pytest.fixture(scope="class")
    @classmethod
    def world(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
        """
        Have a machine for clients and backends, where the tests are.
        """
        with Machine(tmp_path_factory.mktemp("world")) as world, world.network():
            yield world

    @pytest.fixture(scope="class")
    @classmethod
    def host(cls, world: Machine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
        """
        Have a machine for the product, whose network may be broken.
        """
        with Machine(tmp_path_factory.mktemp("host")) as host:
            join(host, world)
            yield host

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls, host: Machine) -> Iterator[Backend]:
        """
        Listen in the world.
        """
        assert host.pid is not None
        with Backend(CLIENT_ADDRESS) as backend:
            yield backend

    @pytest.fixture(scope="class")
    @classmethod
    def product(cls, host: Machine, backend: Backend) -> Iterator[Product]:
        """
        Run the product on the host.
        """
        with ExitStack() as stack:
            with host.network():
                routes = {NAME: backend.address}
                run = router(cls.handoff, routes, address=HOST_ADDRESS)
                product = stack.enter_context(run)
            yield product

    @SIDES
    def test_bytes_sent_again_are_not_bytes_twice(
        self, source: Side, world: Machine, host: Machine, product: Product, backend: Backend
    ) -> None:
        """
        After an outage a sender puts old and new bytes into one segment; each arrives once.
        """
        port = (product.listen if source is Side.CLIENT else backend.address)[1]
        broken = f"tcp dport {port}", f"tcp sport {port}"
        with ExitStack() as stack:
            pairs = [
                stack.enter_context(connection(product.listen, backend)) for _ in range(CONNECTIONS)
            ]
            writers = [Trickle(ends[source]) for ends in pairs]
            readers = [Collector(ends[source.other]) for ends in pairs]
            for _ in range(OUTAGES):
                time.sleep(UP)  # the network works for a while, and then for a while not
                # the way back breaks first: a few bytes arrive, their acknowledgements do not, and
                # when they are sent again there are others behind them
                with (
                    dropping(world, "prerouting", *broken),
                    dropping(host, "prerouting", *broken),
                ):
                    time.sleep(DOWN)
            sent = [writer.end() for writer in writers]

            assert sent == [reader.end() for reader in readers]

    @SIDES
    def test_packets_lost_on_this_host_hold_nothing_up(
        self, source: Side, host: Machine, product: Product, backend: Backend
    ) -> None:
        """
        The host drops a quarter of what it sends itself; all arrives, and the end after it.
        """
        towards = (
            f"tcp dport {backend.address[1]}"
            if source is Side.CLIENT
            else f"tcp sport {product.listen[1]}"
        )
        with (
            connection(product.listen, backend) as ends,
            dropping(host, "output", f"{towards} numgen random mod 100 < 25"),
        ):
            sender = Sender(ends[source], SIZE, BLOCK)
            received = read_all(ends[source.other])
            sender.join()

            assert len(received) == SIZE
            assert received == BLOCK * (SIZE // PIECE)


@contextmanager
def dropping(machine: Machine, hook: str, *matches: str) -> Iterator[None]:
    """
    Drop what *matches* at *hook* meanwhile.
    """
    rules = "\n".join(f"{match} drop" for match in matches)
    chain = f"type filter hook {hook} priority -300;"
    machine.run("nft", f"table ip broken {{\nchain {hook} {{\n{chain}\n{rules}\n}}\n}}")
    try:
        yield
    finally:
        machine.run("nft", "delete table ip broken")


class Trickle:
    """
    A thread that writes a few bytes at a time, until it is to `end`.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sent = bytearray()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        chance = random.Random(self._socket.getpeername()[1])  # noqa: S311 - sizes and noise
        while not self._over.wait(0.002):
            data = chance.randbytes(chance.randrange(20, 100))
            self._socket.sendall(data)
            self._sent += data
        self._socket.shutdown(socket.SHUT_WR)

    def end(self) -> bytes:
        """
        Stop; return all that was sent.
        """
        self._over.set()
        self._thread.join()
        return bytes(self._sent)


class Collector:
    """
    A thread that reads up to the end.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end
        self._got = b""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._got = read_all(self._socket)

    def end(self) -> bytes:
        """
        Return all that came, when the end has come.
        """
        self._thread.join(20)
        return self._got
