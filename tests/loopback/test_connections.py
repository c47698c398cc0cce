"""
Connections under way: listed as they are, and killed with a reset to both sides.
"""

import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from harness.ends import (
    HELLO,
    NAME,
    PATIENCE,
    Backend,
    connection,
    ended_by_reset,
    read_exactly,
)
from harness.operate import LoneRouter, access_lines, ask, lone_router, sniroute, table
from harness.tools import wait_for

from controller.core.wire import PAGE


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with Backend() as backend:
        yield backend


@pytest.fixture
def router(tmp_path: Path, backend: Backend) -> Iterator[LoneRouter]:
    """
    A relaying router with one route.
    """
    with lone_router(tmp_path, "--handoff", "relay") as router:
        ask(router.control, table(1, {NAME: [backend.address]}))
        yield router


def listed(router: LoneRouter, *words: str) -> list[dict[str, Any]]:
    done = sniroute("connections", "--json", "--control", str(router.control), *words)

    assert "" == done.stderr
    return list(json.loads(done.stdout))


def kill(router: LoneRouter, *words: str) -> str:
    done = sniroute("kill", "--control", str(router.control), *words)

    assert (0, "") == (done.returncode, done.stderr)
    return done.stdout


def test_a_connection_is_listed_with_its_two_ends(router: LoneRouter, backend: Backend) -> None:
    """
    Client, backend, hand-off and bytes are those of the connection, and it is listed until its end.
    """
    with connection(router.listen, backend) as (client, end):
        client.sendall(b"in")
        read_exactly(end, 2)
        end.sendall(b"and out")
        read_exactly(client, 7)
        (one,) = listed(router)
        own = client.getsockname()

    wait_for("an empty list", lambda: listed(router) == [])
    assert own == (one["client"], one["client_port"])
    assert backend.address == (one["backend_address"], one["backend_port"])
    assert (NAME, "relay") == (one["route"], one["handoff"])
    assert (len(HELLO) + 2, 7) == (one["bytes_in"], one["bytes_out"])
    assert 0 < one["age"] < PATIENCE
    assert None is one["quiet"]


def test_who_waits_for_a_hello_is_listed_too(router: LoneRouter) -> None:
    """
    A connection without a hello yet has no route and no backend, and is killed like any other.
    """
    with socket.create_connection(router.listen, PATIENCE) as client:
        client.sendall(HELLO[:100])
        (one,) = wait_for("a listed connection", lambda: listed(router))
        kill(router, str(one["id"]))

        assert ended_by_reset(client)
    assert (None, None, None) == (one["route"], one["backend"], one["handoff"])
    (line,) = wait_for("its line", lambda: access_lines(router.log))
    assert "killed" == line["result"]


def test_a_kill_resets_both_sides_of_that_connection_alone(
    router: LoneRouter, backend: Backend
) -> None:
    """
    Client and backend see a reset, the log says why, and the connection beside it goes on.
    """
    with (
        connection(router.listen, backend) as (client, end),
        connection(router.listen, backend) as (other, other_end),
    ):
        first, second = listed(router)

        assert "1 ended\n" == kill(router, str(first["id"]))
        assert ended_by_reset(client)
        assert ended_by_reset(end)
        other.sendall(b"still here")
        assert b"still here" == read_exactly(other_end, 10)
        assert [second["id"]] == [one["id"] for one in listed(router)]
        (line,) = wait_for("its line", lambda: access_lines(router.log))
        ends = router.product.counts("sniroute_connection_ends_total", "reason")
    assert ("forwarded", "killed") == (line["result"], line["reason"])
    assert {"killed": 1} == ends


def test_connections_of_a_client_or_a_route_are_killed_together(
    router: LoneRouter, backend: Backend
) -> None:
    """
    A filter that fits none ends none; one that fits ends all that there are.
    """
    with (
        connection(router.listen, backend) as (client, _),
        connection(router.listen, backend) as (other, _),
    ):
        none = kill(router, "--route", NAME, "--client", "192.0.2.1")
        left = listed(router, "--client", "127.0.0.0/8")
        every = kill(router, "--route", NAME)

        assert ("0 ended\n", 2, "2 ended\n") == (none, len(left), every)
        assert ended_by_reset(client)
        assert ended_by_reset(other)


def test_more_than_a_page_is_listed_and_killed(router: LoneRouter) -> None:
    """
    All are in the list, each once, and all can be ended at once.
    """
    count = PAGE + 20
    with ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(socket.create_connection(router.listen, PATIENCE))
            client.sendall(HELLO[:50])
        ids = wait_for("all of them", lambda: ids_of(router, count))
        ended = kill(router, "--client", "127.0.0.1")

    assert sorted(set(ids)) == ids
    assert f"{count} ended\n" == ended
    assert [] == listed(router)


def ids_of(router: LoneRouter, count: int) -> list[int] | None:
    ids = [one["id"] for one in listed(router)]
    return ids if len(ids) == count else None


def test_without_packets_the_command_says_why(router: LoneRouter) -> None:
    """
    `packet` of a router that was told to relay exits with 1 and tells that.
    """
    done = sniroute("packet", "off", "--control", str(router.control))

    assert (1, "") == (done.returncode, done.stdout)
    assert "sniroute: the packet hand-off is not in use here: not asked for\n" == done.stderr
