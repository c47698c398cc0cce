"""
The log: one JSON object a line, and of each connection exactly one.
"""

import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from harness.ends import (
    HELLO,
    NAME,
    PATIENCE,
    Backend,
    client_hello,
    connection,
    dial,
    read_all,
    read_exactly,
    reset,
)
from harness.loopback import LOOPBACK
from harness.operate import LoneRouter, access_lines, ask, log_lines, lone_router, table
from harness.tools import wait_for


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend() as backend:
        yield backend


@pytest.fixture
def router(tmp_path: Path, backend: Backend) -> Iterator[LoneRouter]:
    with lone_router(tmp_path, "--handoff", "relay") as router:
        ask(router.control, table(1, {NAME: [backend.address]}))
        yield router


def told(router: LoneRouter, count: int = 1) -> list[dict[str, Any]]:
    """
    Wait until *count* connections are told of, and return their lines.
    """
    wait_for(f"{count} lines", lambda: len(access_lines(router.log)) >= count)
    return access_lines(router.log)


def test_a_connection_is_told_whole(router: LoneRouter, backend: Backend) -> None:
    """
    The line has who came, what for, where it went, how, how long, how much, and how it ended.
    """
    with connection(router.listen, backend) as (client, end):
        client.sendall(b"up")
        client_port = client.getsockname()[1]
        client.shutdown(socket.SHUT_WR)
        read_all(end)
        end.sendall(b"down!")
        end.shutdown(socket.SHUT_WR)
        read_all(client)

    (line,) = told(router)

    assert line.pop("timestamp")[:4].isdigit()
    assert 0 < line.pop("hello_seconds") <= line["duration"]
    assert 0 < line.pop("connect_seconds") <= line.pop("duration") < 10
    assert {
        "event": "connection",
        "process": "router",
        "level": "info",
        "client": LOOPBACK,
        "client_port": client_port,
        "server_name": NAME,
        "alpn": [],
        "tls_versions": [0x0304, 0x0303],
        "ech": False,
        "hello_bytes": len(HELLO),
        "route": NAME,
        "backend": f"app-{backend.address[1]}",
        "backend_address": backend.address[0],
        "backend_port": backend.address[1],
        "handoff": "relay",
        "bytes_in": len(HELLO) + 2,
        "bytes_out": 5,
        "result": "forwarded",
        "reason": "client_fin",
    } == {name: line[name] for name in line if name not in {"client_ip", "client_ip_reason"}}


@pytest.mark.parametrize("early", [1, 1000, 100_000])
def test_the_size_of_a_hello_is_its_own(early: int, router: LoneRouter, backend: Backend) -> None:
    """
    What a client sends right behind its hello is none of it, however much was there to look at.
    """
    with dial(router.listen, HELLO + bytes(early)) as client, backend.accept() as end:
        assert bytes(early) == read_exactly(end, early)

        client.shutdown(socket.SHUT_WR)
        read_all(end)

    (line,) = told(router)

    assert (len(HELLO), len(HELLO) + early) == (line["hello_bytes"], line["bytes_in"])


def test_each_connection_has_one_line(router: LoneRouter, backend: Backend) -> None:
    """
    Whatever becomes of it, a connection is told of once, under its own result and reason.
    """
    with connection(router.listen, backend) as (client, end):
        reset(client)
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    with connection(router.listen, backend) as (client, end):
        end.shutdown(socket.SHUT_WR)
        read_all(client)
    for data in (client_hello("unknown.example.com"), b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(router.listen, PATIENCE) as client:
            client.sendall(data)
            read_all(client)

    lines = told(router, 4)

    assert [
        ("forwarded", "backend_fin", NAME),
        ("forwarded", "client_rst", NAME),
        ("no_route", "no_route", "unknown.example.com"),
        ("not_tls", "not_tls", None),
    ] == sorted((line["result"], line["reason"], line["server_name"]) for line in lines)
    refused = [line for line in lines if line["result"] in {"no_route", "not_tls"}]
    assert not [
        name for line in refused for name in ("route", "backend", "bytes_in") if name in line
    ]


def test_no_line_before_the_end(router: LoneRouter, backend: Backend) -> None:
    """
    An open connection is not told of yet.
    """
    with connection(router.listen, backend) as (client, end):
        end.sendall(b"x")
        read_exactly(client, 1)

        assert [] == access_lines(router.log)

    told(router)


def test_no_access_log_means_none(tmp_path: Path, backend: Backend) -> None:
    """
    With --no-access-log no connection is told of, and the rest of the log stays.
    """
    with lone_router(tmp_path, "--handoff", "relay", "--no-access-log") as router:
        ask(router.control, table(1, {NAME: [backend.address]}))
        with connection(router.listen, backend) as (client, _):
            reset(client)
        with socket.create_connection(router.listen, PATIENCE) as client:
            client.sendall(client_hello("unknown.example.com"))
            read_all(client)
        ended = "sniroute_connections_total"
        wait_for("the ends", lambda: sum(router.product.counts(ended, "").values()) == 2)

    assert [] == access_lines(router.log)
    events = [line["event"] for line in log_lines(router.log)]
    assert {"router ready", "table", "draining", "router stopped"} <= set(events)


def test_every_line_can_be_read(router: LoneRouter, backend: Backend) -> None:
    """
    Each line is JSON, with its process, level, event and time of day in UTC.
    """
    with dial(router.listen) as client:
        backend.accept().close()
        read_all(client)
    told(router)

    for line in log_lines(router.log):
        assert {"process": "router", "level": "info"} == {k: line[k] for k in ("process", "level")}
        assert line["event"]
        age = datetime.now(UTC) - datetime.fromisoformat(line["timestamp"])
        assert timedelta() <= age < timedelta(minutes=1)


def test_the_level_is_kept(tmp_path: Path, backend: Backend) -> None:
    """
    With --log-level warning only what is wrong is told, and a bad table is.
    """
    with LoneRouter(tmp_path, "--handoff", "relay", "--log-level", "warning") as router:
        ask(router.control, table(1, {NAME: [backend.address]}))
        ask(router.control, table(2, {}) | {"routes": 7})
        with socket.create_connection(router.listen, PATIENCE) as client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            read_all(client)
        wait_for("a line", lambda: log_lines(router.log))
        code = router.stop()

    assert [("table refused", "routes: not a list")] == [
        (line["event"], line["error"]) for line in log_lines(router.log)
    ]
    assert code == 0
