"""
The end of the product: no new connections, and the time that the old ones were promised.
"""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.error import HTTPError

import pytest
from harness.ends import (
    HELLO,
    NAME,
    PATIENCE,
    Backend,
    connection,
    dial,
    ended_by_reset,
    read_all,
    read_exactly,
)
from harness.loopback import Product, router
from harness.operate import access_lines, has_ended, log_lines
from harness.tools import wait_for

PENDING = "sniroute_connections_pending"


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend() as backend:
        yield backend


def refuses(product: Product) -> bool:
    """
    Tell whether the port is closed.
    """
    try:
        with socket.create_connection(product.listen, PATIENCE):
            return False
    except ConnectionRefusedError:
        return True


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_open_connections_end_well(number: signal.Signals, backend: Backend) -> None:
    """
    At the signal the port closes; an open connection goes on, and the product ends with it.
    """
    with (
        router("relay", {NAME: backend.address}, "--drain", "30") as product,
        connection(product.listen, backend) as (client, end),
    ):
        os.kill(product.pid, number)
        wait_for("a closed port", lambda: refuses(product), timeout=5, every=0.01)
        client.sendall(b"still here")
        heard = read_exactly(end, 10)
        with pytest.raises(HTTPError, match="503"):
            product.get("/healthz")
        before = has_ended(product.pid)
        # a second signal changes nothing
        os.kill(product.pid, number)
        end.sendall(b"bye")
        end.shutdown(socket.SHUT_WR)

        assert (b"still here", b"bye", False) == (heard, read_all(client), before)

        client.shutdown(socket.SHUT_WR)

        assert end.recv(1) == b""
        wait_for("the end", lambda: has_ended(product.pid), timeout=5)


def test_time_is_up_in_the_end(backend: Backend) -> None:
    """
    What is still open after --drain seconds is reset, both ends, and the product ends well.
    """
    with router("relay", {NAME: backend.address}, "--drain", "1") as product, ExitStack() as stack:
        client, end = stack.enter_context(connection(product.listen, backend))
        # one that has not said its hello yet goes too
        early = stack.enter_context(socket.create_connection(product.listen, PATIENCE))
        early.sendall(HELLO[:50])
        wait_for("both", lambda: sum(product.counts(PENDING, "").values()) == 1)
        began = time.monotonic()
        os.kill(product.pid, signal.SIGTERM)

        assert ended_by_reset(client)
        assert 0.8 < time.monotonic() - began < 3
        assert ended_by_reset(end)
        assert ended_by_reset(early)
        wait_for("the end", lambda: has_ended(product.pid), timeout=5)
        ends = sorted((line["result"], line["reason"]) for line in access_lines(product.log))
        assert [("drain_timeout", "drain_timeout"), ("forwarded", "drain_timeout")] == ends


def test_nothing_to_wait_for(backend: Backend) -> None:
    """
    Without connections the product ends at once, whatever --drain says.
    """
    with router("relay", {NAME: backend.address}, "--drain", "30") as product:
        began = time.monotonic()
        os.kill(product.pid, signal.SIGTERM)
        wait_for("the end", lambda: has_ended(product.pid), timeout=10)

        assert time.monotonic() - began < 5


def test_a_drain_of_no_time_resets_at_once(backend: Backend) -> None:
    """
    With --drain 0 no connection is waited for.
    """
    with (
        router("relay", {NAME: backend.address}, "--drain", "0") as product,
        connection(product.listen, backend) as (client, end),
    ):
        os.kill(product.pid, signal.SIGTERM)

        assert ended_by_reset(client)
        assert ended_by_reset(end)


def test_the_log_tells_of_the_end(backend: Backend) -> None:
    """
    The router says that it drains and how many connections it waits for, and that it has stopped.
    """
    with router("relay", {NAME: backend.address}, "--drain", "20") as product:
        with connection(product.listen, backend):
            os.kill(product.pid, signal.SIGTERM)
            wait_for("a closed port", lambda: refuses(product))
        wait_for("the end", lambda: has_ended(product.pid))
        words = [line for line in log_lines(product.log) if line["process"] == "router"][-3:]

    assert ["draining", "connection", "router stopped"] == [line["event"] for line in words]
    assert (1, 20) == (words[0]["connections"], words[0]["seconds"])


def test_a_connection_in_the_making_is_served(backend: Backend) -> None:
    """
    A client whose hello is half there at the signal still has its connection.
    """
    with (
        router("relay", {NAME: backend.address}, "--drain", "20") as product,
        socket.create_connection(product.listen, PATIENCE) as client,
    ):
        client.sendall(HELLO[:50])
        wait_for("it", lambda: sum(product.counts(PENDING, "").values()) == 1)
        os.kill(product.pid, signal.SIGTERM)
        wait_for("a closed port", lambda: refuses(product))
        client.sendall(HELLO[50:])
        with backend.accept() as end:
            end.sendall(b"welcome")

            assert read_exactly(client, 7) == b"welcome"


def test_dial_after_the_end_is_refused(backend: Backend) -> None:
    """
    While one connection is waited for, a new one is refused by the kernel, not left to hang.
    """
    with (
        router("relay", {NAME: backend.address}, "--drain", "20") as product,
        connection(product.listen, backend),
    ):
        os.kill(product.pid, signal.SIGTERM)
        wait_for("a closed port", lambda: refuses(product))

        with pytest.raises(ConnectionRefusedError):
            dial(product.listen)
