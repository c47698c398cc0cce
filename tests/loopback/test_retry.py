"""
A backend that fails while it is told of the client: the next one is told the same.
"""

import socket
import threading
from typing import Any

import pytest
from controller.router._native import lib
from harness.ends import HELLO, NAME, PATIENCE, read_all

from controller.core.proxyprotocol import write_header
from controller.core.routes import Backend, Route, RouteTable
from controller.router import connection
from controller.router.listen import bind_listener
from controller.router.loop import Loop
from controller.router.relay import RelayHandoff
from controller.router.router import Router
from controller.settings import RouterSettings

HEADER = write_header("v1", ("192.0.2.7", 5000), ("203.0.113.9", 443), authority=None, alpn=None)


def test_the_next_backend_is_told_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The first backend resets when the header is written to it; the second gets all, once.
    """
    really_send = connection._send  # noqa: SLF001 - the write that is to fail
    failures = iter([ConnectionResetError(104, "reset")])

    def send(fd: int, data: bytes) -> int:
        for failure in failures:
            raise failure
        return really_send(fd, data)

    monkeypatch.setattr(connection, "_send", send)
    settings = RouterSettings(
        proxy_protocol_from=("127.0.0.0/8",), client_ip="off", metrics="off", access_log=False
    )
    lib.hello_init()
    loop = Loop()
    router = Router(settings, loop, 16)
    router.ladder = [RelayHandoff(loop)]
    with (
        bind_listener("127.0.0.1:0", 1 << 20) as listener,
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
        socket.socket() as client,
    ):
        backends = tuple(
            Backend(name, "file", *end.getsockname(), proxy_protocol="v1")
            for name, end in (("one", one), ("two", two))
        )
        router.replace_table(RouteTable(1, [Route(NAME, backends)]))
        router.listen([listener])
        client.settimeout(PATIENCE)
        client.connect(listener.getsockname())
        client.sendall(HEADER + HELLO + b"and more")
        client.shutdown(socket.SHUT_WR)
        got: list[Any] = []
        reader = threading.Thread(target=lambda: got.append(taken_from(two)), daemon=True)
        reader.start()
        while reader.is_alive() or router.connections:
            loop.turn(0.05)

    assert got == [HEADER + HELLO + b"and more"]
    assert router.stats.connect_errors == {(NAME, "econnreset"): 1}


def taken_from(listener: socket.socket) -> bytes:
    """
    Read all that the next connection to *listener* brings.
    """
    listener.settimeout(PATIENCE)
    with listener.accept()[0] as end:
        end.settimeout(PATIENCE)
        return read_all(end)
