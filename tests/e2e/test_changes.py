"""
Containers that move and containers that stop.
"""

from datetime import datetime
from typing import Any

import pytest
from harness import fetch
from harness.apps import App, RunApp
from harness.engines import Engine
from harness.product import HANDOFFS, Sniroute
from harness.tools import wait_for

EACH_HANDOFF = pytest.mark.parametrize("sniroute", HANDOFFS, indirect=True)

HOST = "one.example.test"

PROMPT = 0.5
"""Seconds from an engine's event to the table that follows from it."""


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
    events = engine.api.events(since=0, until=int(when) + 1, filters=filters, decode=True)
    return when - max(event["timeNano"] / 1e9 for event in events)


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
