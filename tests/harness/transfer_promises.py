"""
What holds for every byte by every hand-off: the folders loopback/ and kernel/ each run these.
"""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import ClassVar, Final

import psutil
import pytest

from controller.core.alert import INTERNAL_ERROR, alert
from controller.core.session import Side
from harness.ends import (
    HELLO,
    NAME,
    PATIENCE,
    PIECE,
    Backend,
    Sender,
    connection,
    dial,
    ended_by_reset,
    read_all,
    read_exactly,
    receive_digest,
    reset,
)
from harness.loopback import Product
from harness.promises import Promises
from harness.tools import wait_for

ROUNDS: Final = 200
BULK: Final = 2 * 1024**3
STALL_SECONDS: Final = 3.0
STALLED: Final = 200
BOUND: Final = 16 * 1024**2
"""Bytes that a connection may hold when one end does not read, both ends' own buffers included."""

BLOCK: Final = os.urandom(PIECE)

SIDES = pytest.mark.parametrize("source", list(Side), ids=["upload", "download"])


class TransferPromises(Promises):
    """
    The promises; a subclass names the hand-off.
    """

    queue: ClassVar[int] = PIECE
    """Bytes that a connection takes in while nobody reads."""

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Iterator[Backend]:
        """
        Listen for the class's connections.
        """
        with cls.at_home():
            backend = Backend(cls.home)
        with backend:
            yield backend

    @pytest.fixture(scope="class")
    @classmethod
    def product(cls, backend: Backend) -> Iterator[Product]:
        """
        Run the product for the class.
        """
        with cls.router({NAME: backend.address}, "--no-access-log") as product:
            yield product

    @pytest.fixture(autouse=True)
    def nothing_left(self, product: Product) -> Iterator[None]:
        """
        After each test the router has the descriptors and map entries that it had before.
        """
        before = descriptors(product)
        yield
        wait_for("no connection left", lambda: active(product) == 0)
        wait_for("no descriptor left", lambda: descriptors(product) <= before)
        assert self.left_in_kernel(product) == 0

    def left_in_kernel(self, _: Product) -> int:
        """
        Count what the hand-off left in the kernel.
        """
        return 0

    @SIDES
    def test_bulk_arrives_whole(self, source: Side, product: Product, backend: Backend) -> None:
        """
        2 GiB as fast as they go have the same hash at the other end.
        """
        with connection(product.listen, backend) as ends:
            sender = Sender(ends[source], BULK, BLOCK)
            received = receive_digest(ends[source.other])

            assert (BULK, sender.join()) == received

    @SIDES
    def test_a_stalled_reader_stalls_its_writer(
        self, source: Side, product: Product, backend: Backend
    ) -> None:
        """
        One end blasts and the other reads nothing: memory stays bounded, and all arrives later.
        """
        with connection(product.listen, backend) as ends:
            before = memory(product)
            sender = Sender(ends[source], BULK // 8, BLOCK)
            samples, until = [], time.monotonic() + STALL_SECONDS
            while time.monotonic() < until:
                time.sleep(0.1)
                samples.append(memory(product) - before)
            # as nothing is read, all of it is held: by any socket, by the kernel between them
            sent = sender.sent
            received = receive_digest(ends[source.other])

            assert sent < BOUND
            assert max(samples) < BOUND
            assert (BULK // 8, sender.join()) == received

    @SIDES
    def test_a_stalled_direction_does_not_hold_the_other(
        self, source: Side, product: Product, backend: Backend
    ) -> None:
        """
        While an end does not read what it is sent, all that it sends still arrives.
        """
        with connection(product.listen, backend) as ends:
            near, far = ends[source], ends[source.other]
            flood = Sender(far, BULK // 16, BLOCK)
            wait_for("the flood is stalled", lambda: stands_still(lambda: flood.sent))
            sender = Sender(near, BULK // 16, BLOCK)

            received = receive_digest(far)

            assert (BULK // 16, sender.join()) == received

            received = receive_digest(near)

            assert (BULK // 16, flood.join()) == received

    def test_many_stalled_readers_cost_little(self, product: Product, backend: Backend) -> None:
        """
        200 stalled downloads hold less than the bound each, and take less than 3 % of a core.
        """
        with ExitStack() as stack:
            before = memory(product)
            senders = []
            for _ in range(STALLED):
                _, end = stack.enter_context(connection(product.listen, backend))
                end.setblocking(False)
                senders.append([end, 0])
            wait_for("every writer is stalled", lambda: not sum(map(send_more, senders)), every=0.5)
            # one look is enough: other users of the kernel's workers only ever add to it
            wait_for("less than 3 % of a core", lambda: cpu_share(product) < 0.03, every=0)
            held = max(sent for _, sent in senders)

            assert held < BOUND
            assert memory(product) - before < STALLED * PIECE

    @SIDES
    def test_half_close_comes_after_the_data(
        self, source: Side, product: Product, backend: Backend
    ) -> None:
        """
        A FIN behind queued data never overtakes it, and the other direction goes on.
        """
        for _ in range(ROUNDS):
            with connection(product.listen, backend) as ends:
                near, far = ends[source], ends[source.other]
                sender = Sender(near, self.queue, BLOCK)
                sender.join()

                assert read_all(far) == BLOCK[: self.queue]

                far.sendall(BLOCK[:100_000])
                far.shutdown(socket.SHUT_WR)

                assert read_all(near) == BLOCK[:100_000]

    @SIDES
    def test_a_lone_fin_passes(self, source: Side, product: Product, backend: Backend) -> None:
        """
        A FIN without data is passed on as such, and the other direction still works.
        """
        for _ in range(ROUNDS):
            with connection(product.listen, backend) as ends:
                near, far = ends[source], ends[source.other]
                near.shutdown(socket.SHUT_WR)

                assert far.recv(1) == b""

                far.sendall(b"still here")

                assert read_exactly(near, 10) == b"still here"
                assert far.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0

    @SIDES
    def test_a_reset_passes_as_a_reset(
        self, source: Side, product: Product, backend: Backend
    ) -> None:
        """
        A RST of one end is a RST at the other, at once.
        """
        for _ in range(ROUNDS):
            with connection(product.listen, backend) as ends:
                ends[source.other].sendall(b"some data")
                reset(ends[source])

                assert ended_by_reset(ends[source.other])

    def test_an_urgent_byte_is_one_like_any_other(self, product: Product, backend: Backend) -> None:
        """
        Bytes that a client marks as urgent keep their place, and the end comes behind them.
        """
        with socket.create_connection(product.listen, PATIENCE) as client:
            client.send(HELLO[:1], socket.MSG_OOB)
            client.sendall(HELLO[1:])
            with backend.accept() as end:
                client.send(b"!", socket.MSG_OOB)
                client.sendall(b"?")
                client.shutdown(socket.SHUT_WR)

                assert read_all(end) == b"!?"

    def test_both_ends_close_at_once(self, product: Product, backend: Backend) -> None:
        """
        Data and FIN sent by both ends at the same moment all arrive.
        """
        for _ in range(ROUNDS):
            with connection(product.listen, backend) as (client, end):
                up, down = Sender(client, 50_000, BLOCK), Sender(end, 50_000, BLOCK)
                up.join()
                down.join()

                assert read_all(end) == BLOCK[:50_000]
                assert read_all(client) == BLOCK[:50_000]

    def test_a_backend_that_is_gone(self) -> None:
        """
        A client of a backend that does not listen gets internal_error, and the end.
        """
        with self.at_home(), socket.create_server((self.home, 0)) as gone:
            address = gone.getsockname()
        with self.router({NAME: address}) as product:
            before = descriptors(product)
            for _ in range(ROUNDS):
                with dial(product.listen) as client:
                    assert read_all(client) == alert(INTERNAL_ERROR)

            wait_for("no descriptor left", lambda: descriptors(product) <= before)
            failed = product.counts("sniroute_connections_total", "result")["connect_failed"]

            assert failed == ROUNDS


def memory(product: Product) -> int:
    """
    Read how many bytes of memory the router's process has.
    """
    return psutil.Process(router_pid(product)).memory_info().rss


def active(product: Product) -> float:
    """
    Count the connections that the router knows of.
    """
    known = ("sniroute_connections_active", "sniroute_connections_pending")
    return sum(sum(product.counts(name, "").values()) for name in known)


def router_pid(product: Product) -> int:
    """
    Find the router process.
    """
    for child in psutil.Process(product.pid).children():
        if "controller.router" in child.cmdline():
            return child.pid
    raise AssertionError("no router process")


def descriptors(product: Product) -> int:
    """
    Count the router's descriptors, without those of the metrics server's clients.
    """
    return psutil.Process(router_pid(product)).num_fds()


def cpu_seconds(product: Product) -> float:
    """
    Sum the processor time of the router and of the kernel's workers, which move its bytes.
    """
    times = [psutil.Process(router_pid(product)).cpu_times()]
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith("kworker"):
                times.append(process.cpu_times())
    return sum(t.user + t.system for t in times)


def cpu_share(product: Product) -> float:
    """
    Measure for 2 s how much of a core moving bytes takes.
    """
    started, spent = time.monotonic(), cpu_seconds(product)
    time.sleep(2)  # what is measured is how little happens in it
    return (cpu_seconds(product) - spent) / (time.monotonic() - started)


def stands_still(count: Callable[[], int]) -> bool:
    """
    Watch *count* for half a second, and tell whether it stays what it is.
    """
    before = count()
    time.sleep(0.5)
    return count() == before


def send_more(sender: list) -> int:
    """
    Send until the socket takes no more; count what it took.
    """
    took = 0
    try:
        while True:
            took += sender[0].send(BLOCK)
    except BlockingIOError:
        sender[1] += took
    return took
