"""
Containers that move and containers that stop.
"""

import contextlib
import os
import select
import ssl
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import docker
import pytest
from docker.types import IPAMConfig, IPAMPool
from harness import fetch
from harness.apps import App, RunApp
from harness.engines import Engine
from harness.lab import access_line
from harness.product import HANDOFFS, Sniroute
from harness.tools import wait_for

EACH_HANDOFF = pytest.mark.parametrize("sniroute", HANDOFFS, indirect=True)

HOST = "one.example.test"

GONE = "gone.example.test"

HEARD = 2.0
"""Seconds from when an engine says that a container has gone to the end of its connections."""

PROMPT = 0.5
"""Seconds from an engine's event to the table that follows from it."""


@pytest.fixture
def network(engine: Engine) -> Iterator[Any]:
    """
    Have one more network, which the test may remove.
    """
    ipam = IPAMConfig(pool_configs=[IPAMPool(subnet="198.18.70.0/24")])
    network = engine.api.networks.create("vanishes", driver="bridge", ipam=ipam)
    yield network
    with contextlib.suppress(docker.errors.NotFound):
        network.remove()


def address_in(app: App, network: Any) -> str:
    app.container.reload()
    return app.container.attrs["NetworkSettings"]["Networks"][network.name]["IPAddress"]


def next_table(sniroute: Sniroute, seen: int, change: str) -> dict[str, Any]:
    """
    Wait for a table whose log line says that HOST was *change*, after *seen* lines of the log.
    """

    def acknowledged() -> dict[str, Any] | None:
        lines = list(sniroute.log())[seen:]
        tables = (line for line in lines if line["event"] == "table acknowledged")
        return next((line for line in tables if HOST in line[change]), None)

    return wait_for(f"a table with {HOST} {change}", acknowledged)


def seconds_from_start(engine: Engine, app: App, table: dict[str, Any]) -> float:
    """
    Tell how long *table* came after the engine's last start event of *app*, by their own clocks.
    """
    when = datetime.fromisoformat(table["timestamp"]).timestamp()
    filters = {"container": app.container.id, "event": "start"}

    def started() -> float | None:
        # at a time that is past Podman stops before it has read what there is
        until = int(time.time()) + 2
        events = engine.api.events(since=0, until=until, filters=filters, decode=True)
        return max((event["timeNano"] / 1e9 for event in events), default=None)

    return when - wait_for("the event of a start", started)


@EACH_HANDOFF
def test_a_container_that_restarts_elsewhere_is_followed(
    engine: Engine, run_app: RunApp, sniroute: Sniroute
) -> None:
    """
    A restart with a new address is in the table within 500 ms of the engine's event.

    The next connection reaches it, not the container that took the old address meanwhile.
    """
    app = run_app("one", {"sniroute.host": HOST})
    old = app.address
    sniroute.wait_for_route(HOST, old)
    app.container.stop(timeout=2)
    squatter = run_app("squatter", {}, sites=HOST, address=old)
    seen = len(list(sniroute.log()))

    app.container.start()
    table = next_table(sniroute, seen, "added")
    app.wait_until_serving(HOST)
    answer = fetch.fetch(engine.client, engine.front, HOST, app.root + squatter.root)

    assert old != app.address
    assert ("one", app.address) == (answer.app, answer.address)
    assert 0 < seconds_from_start(engine, app, table) < PROMPT
    assert 0 < table["event_ms"] < PROMPT * 1000


def test_a_container_that_changes_its_address_while_it_runs_is_followed(
    engine: Engine, run_app: RunApp, sniroute: Sniroute
) -> None:
    """
    A container that leaves its network and comes back with another address is found there.
    """
    app = run_app("one", {"sniroute.host": HOST})
    old = app.address
    sniroute.wait_for_route(HOST, old)

    engine.network.disconnect(app.container)
    squatter = run_app("squatter", {}, sites=HOST, address=old)
    engine.network.connect(app.container)
    sniroute.wait_for_route(HOST, app.address)
    answer = fetch.fetch(engine.client, engine.front, HOST, app.root + squatter.root)

    assert old != app.address
    assert ("one", app.address) == (answer.app, answer.address)


def test_a_container_that_pauses_is_alive_but_gets_no_connections(
    run_app: RunApp, sniroute: Sniroute
) -> None:
    """
    A pause takes the route, not the container: what it has under way is not to be cut.
    """
    app = run_app("one", {"sniroute.host": HOST})
    sniroute.wait_for_route(HOST, app.address)

    app.container.pause()
    sniroute.wait_for_route(HOST)
    (paused,) = sniroute.status()["engines"]
    app.container.unpause()
    sniroute.wait_for_route(HOST, app.address)
    app.container.stop(timeout=2)
    sniroute.wait_for_route(HOST)
    (stopped,) = sniroute.status()["engines"]

    assert (1, 0) == (paused["containers"], stopped["containers"])


@EACH_HANDOFF
def test_a_container_that_stops_is_refused(
    engine: Engine, run_app: RunApp, sniroute: Sniroute
) -> None:
    """
    The name of a stopped container is refused with unrecognized_name, not tried and timed out.

    Started again it is served again.
    """
    app = run_app("one", {"sniroute.host": HOST})
    sniroute.wait_for_route(HOST, app.address)

    app.container.stop(timeout=2)
    sniroute.wait_for_route(HOST)

    with pytest.raises(fetch.RefusedError, match="UNRECOGNIZED_NAME"):
        fetch.fetch(engine.client, engine.front, HOST, app.root)

    app.container.start()
    sniroute.wait_for_route(HOST, app.address)
    app.wait_until_serving(HOST)

    assert "one" == fetch.fetch(engine.client, engine.front, HOST, app.root).app


def test_a_client_hears_of_a_container_that_is_killed(
    engine: Engine, run_app: RunApp, sniroute: Sniroute
) -> None:
    """
    A container is killed and removed, and a client whose packets are translated learns of it.
    """
    app = run_app("one", {"sniroute.host": HOST})
    sniroute.wait_for_route(HOST, app.address)

    with fetch.connect(engine.client, engine.front, HOST, app.root) as sock:
        fetch.get(sock, HOST)
        client = sock.getsockname()[:2]
        sock.settimeout(HEARD)
        app.container.kill()
        with contextlib.suppress(ConnectionResetError, ssl.SSLEOFError):
            assert b"" == sock.recv(1)
        app.remove()

    assert "packet" == access_line(sniroute, client)["handoff"]


def test_a_client_hears_of_a_container_that_says_nothing(
    engine: Engine, run_app: RunApp, sniroute: Sniroute, network: Any
) -> None:
    """
    A container loses its network, which is removed, so not even its kernel can speak to a client.

    The client, in the middle of a connection that is translated, is reset all the same; another
    container's client is not.
    """
    app = run_app("one", {"sniroute.host": HOST})
    gone = run_app("gone", {"sniroute.host": GONE, "sniroute.network": network.name})
    network.connect(gone.container)
    sniroute.wait_for_route(HOST, app.address)
    sniroute.wait_for_route(GONE, address_in(gone, network))

    with (
        fetch.connect(engine.client, engine.front, GONE, gone.root) as sock,
        fetch.connect(engine.client, engine.front, HOST, app.root) as other,
    ):
        fetch.get(sock, GONE)
        fetch.get(other, HOST)
        client = sock.getsockname()[:2]
        network.disconnect(gone.container, force=True)
        network.remove()
        heard, _, _ = select.select([sock], [], [], HEARD)

        assert [sock] == heard
        with pytest.raises(ConnectionResetError):
            # of TLS it would be an end like any other
            os.read(sock.fileno(), 1)
        assert fetch.get(other, HOST)
    line = access_line(sniroute, client)
    assert ("packet", "backend_gone") == (line["handoff"], line["reason"])
