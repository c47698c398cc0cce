"""
What holds for PROXY headers by every hand-off: the folders loopback/ and kernel/ each run these.
"""

import hashlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest

from controller.core.proxyprotocol import Address, read_header, write_header
from harness.ends import (
    HELLO,
    NAME,
    PATIENCE,
    Backend,
    dial,
    read_all,
    read_exactly,
    receive_digest,
)
from harness.loopback import Product
from harness.promises import Promises
from harness.tools import wait_for

CLIENTS: Final[tuple[Address, ...]] = (("192.0.2.7", 51000), ("2001:db8::7", 52000))
LOCALS: Final[tuple[Address, ...]] = (("203.0.113.9", 443), ("2001:db8::9", 443))

EARLY: Final = os.urandom(300_000)

HEADERS: Final = [
    write_header(version, client, local, authority=None, alpn=None)
    for version in ("v1", "v2")
    for client, local in zip(CLIENTS, LOCALS, strict=True)
]

LOCAL_HEADER: Final = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"


class ProxyPromises(Promises):
    """
    The promises; a subclass names the hand-off.
    """

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
    def trusting(cls, backend: Backend) -> Iterator[Product]:
        """
        Run the product with loopback as a trusted sender.
        """
        routes = {NAME: backend.address}
        with cls.router(routes, "--proxy-protocol-from", cls.origin) as product:
            yield product

    @pytest.mark.parametrize("header", HEADERS)
    def test_a_header_is_read_and_not_passed_on(
        self, header: bytes, trusting: Product, backend: Backend
    ) -> None:
        """
        Cut anywhere, header and hello are told apart: the backend gets the hello alone.
        """
        stream = header + HELLO
        for cut in range(1, len(header) + 40):
            with socket.create_connection(trusting.listen, timeout=PATIENCE) as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                client.sendall(stream[:cut])
                client.sendall(stream[cut:])
                with backend.accept() as end:
                    end.sendall(b"answer")

                    assert read_exactly(client, 6) == b"answer"

    def test_goes_by_this_hand_off(self, trusting: Product, backend: Backend) -> None:
        """
        Behind a header that is read the hello goes by the same hand-off as without one.

        The backend answers as soon as it has come.
        """
        ports = set()
        for header in HEADERS * 20:
            with socket.create_connection(trusting.listen, timeout=PATIENCE) as client:
                ports.add(client.getsockname()[1])
                client.sendall(header + HELLO)
                with backend.accept() as end:
                    end.sendall(b"answer")

                    assert read_exactly(client, 6) == b"answer"
        lines = [wait_for("the log", lambda port=port: logged(trusting, port)) for port in ports]

        assert {self.handoff} == {line["handoff"] for line in lines}

    def test_the_clients_address_is_the_one_told(self, trusting: Product, backend: Backend) -> None:
        """
        The log has the address of the header, and the sender's own beside it.
        """
        for header, client in zip(HEADERS, CLIENTS * 2, strict=True):
            with socket.create_connection(trusting.listen, timeout=PATIENCE) as end:
                end.sendall(header + HELLO)
                port = end.getsockname()[1]
                backend.accept().close()
            line = wait_for("the log", lambda port=port: logged(trusting, port))

            assert (line["client"], line["client_port"]) == client
            assert line["sender"] == self.origin

    def test_local_headers_count_as_the_sender(self, trusting: Product, backend: Backend) -> None:
        """
        A LOCAL header, as health checks send it, leaves the connection's own address.
        """
        with socket.create_connection(trusting.listen, timeout=PATIENCE) as end:
            end.sendall(LOCAL_HEADER + HELLO)
            own = end.getsockname()
            backend.accept().close()
        line = wait_for("the log", lambda: logged(trusting, own[1]))

        assert (line["client"], line["client_port"]) == own

    @pytest.mark.parametrize("size", [1, 10_000, 3_000_000])
    def test_early_data_behind_a_header_arrives_whole(
        self, size: int, trusting: Product, backend: Backend
    ) -> None:
        """
        What is sent in one go with header and hello arrives in order, and is counted.
        """
        data = (EARLY * (size // len(EARLY) + 1))[:size]
        with socket.create_connection(trusting.listen, timeout=PATIENCE) as client:
            client.setblocking(False)
            # as much as the sockets take before anybody accepts, the rest later
            sent = client.send(HEADERS[2] + HELLO + data)
            client.settimeout(PATIENCE)
            with backend.accept() as end, ThreadPoolExecutor(1) as writer:
                writing = writer.submit(end_with, client, (HEADERS[2] + HELLO + data)[sent:])

                assert receive_digest(end) == (size, hashlib.sha256(data).hexdigest())

                writing.result()
            port = client.getsockname()[1]
        line = wait_for("the log", lambda: logged(trusting, port))

        assert len(HELLO) + size == line["bytes_in"]

    @pytest.mark.parametrize(
        "data",
        [HELLO, b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 3\r\n" + HELLO, b"GET / HTTP/1.1\r\n\r\n"],
        ids=["no header", "bad header", "http"],
    )
    def test_a_trusted_sender_must_send_a_header(self, data: bytes, trusting: Product) -> None:
        """
        Without a good header nothing is believed, and nothing routed.
        """
        before = refusals(trusting).get("proxy_invalid", 0)
        with socket.create_connection(trusting.listen, timeout=PATIENCE) as client:
            client.sendall(data)

            assert read_all(client) == b""

        wait_for("one more refusal", lambda: refusals(trusting).get("proxy_invalid") == before + 1)

    def test_a_header_from_anyone_else_is_refused(self, backend: Backend) -> None:
        """
        A spoofed header is not TLS: no backend hears of it.
        """
        options = ("--proxy-protocol-from", "192.0.2.0/24")
        with self.router({NAME: backend.address}, *options) as product:
            for header in HEADERS:
                with socket.create_connection(product.listen, timeout=PATIENCE) as client:
                    client.sendall(header + HELLO)

                    assert read_all(client) == b""

            wait_for("all refused", lambda: refusals(product) == {"not_tls": len(HEADERS)})

    @pytest.mark.parametrize("version", ["v1", "v2"])
    @pytest.mark.parametrize("told", [None, *HEADERS])
    def test_a_backend_is_told_of_the_client(self, version: str, told: bytes | None) -> None:
        """
        The header that a backend asked for comes first: with the client's address, or the told one.
        """
        options = ("--proxy-protocol-from", self.origin) if told else ()
        with self.at_home():
            listener = socket.create_server((self.home, 0))
        with (
            listener,
            self.router(
                {NAME: listener.getsockname()},
                *options,
                keys={"proxy-protocol": version},
            ) as product,
        ):
            listener.settimeout(PATIENCE)
            for _ in range(20):
                if told:
                    client = socket.create_connection(product.listen, timeout=PATIENCE)
                    client.sendall(told + HELLO)
                    expected = read_header(told)
                    source, destination = expected.source, expected.destination
                else:
                    client = dial(product.listen)
                    source, destination = client.getsockname(), product.listen
                with client, listener.accept()[0] as end:
                    client.sendall(b"more")
                    client.shutdown(socket.SHUT_WR)
                    end.settimeout(PATIENCE)
                    got = read_all(end)
                    header = read_header(got)

                    assert (header.source, header.destination) == (source, destination)
                    assert header.authority == (NAME if version == "v2" else None)
                    assert got[header.size :] == HELLO + b"more"


def end_with(client: socket.socket, data: bytes) -> None:
    """
    Send *data* and a FIN.
    """
    client.sendall(data)
    client.shutdown(socket.SHUT_WR)


def refusals(product: Product) -> dict[str, float]:
    """
    Count the connections that have ended, by result.
    """
    return product.counts("sniroute_connections_total", "result")


def logged(product: Product, sender_port: int) -> dict[str, Any] | None:
    """
    Find the line of the connection that came from *sender_port*.
    """
    lines = (line for line in product.lines() if line["event"] == "connection")
    return next((line for line in lines if line.get("sender_port") == sender_port), None)
