"""
Pages of labelled containers, fetched by name.
"""

import re

import pytest
from harness import fetch
from harness.apps import BLOB, RunApp
from harness.engines import Engine
from harness.product import HANDOFFS, Sniroute
from harness.tools import wait_for

EACH_HANDOFF = pytest.mark.parametrize("sniroute", HANDOFFS, indirect=True)
EACH_CLIENT = pytest.mark.parametrize("client", fetch.CLIENTS)


@EACH_HANDOFF
@EACH_CLIENT
def test_each_name_is_answered_by_its_own_container(
    engine: Engine, run_app: RunApp, sniroute: Sniroute, client: str
) -> None:
    """
    A page comes from the container labelled for its name, and nobody terminates TLS on the way.

    The client trusts that container's CA only, and gets the protocol that it asked for.
    """
    apps = [run_app(name, {"sniroute.host": f"{name}.example.test"}) for name in ("one", "two")]
    for app in apps:
        sniroute.wait_for_route(f"{app.name}.example.test", app.address)
    fetch_page, protocol = fetch.CLIENTS[client]

    for app in apps:
        host = f"{app.name}.example.test"
        answer = fetch_page(engine.client, engine.front, host, app.root)

        assert fetch.Answer(app.name, host, protocol, app.address) == answer


@pytest.mark.parametrize(
    ("sniroute", "handoff"), [(name, name) for name in HANDOFFS], indirect=["sniroute"]
)
def test_the_chosen_hand_off_carries_the_bytes(
    engine: Engine, run_app: RunApp, sniroute: Sniroute, handoff: str
) -> None:
    """
    All bytes are counted under the hand-off that was asked for: no silent fall to another.
    """
    host = "one.example.test"
    app = run_app("one", {"sniroute.host": host})
    sniroute.wait_for_route(host, app.address)

    with fetch.connect(engine.client, engine.front, host, app.root) as sock:
        assert BLOB == fetch.get(sock, host, "/blob")
    wait_for("the end", lambda: sniroute.metric("sniroute_connections_total", route=host) == 1)

    moved = "sniroute_forward_bytes_total"
    assert len(BLOB) < sniroute.metric(moved, handoff=handoff, route=host, direction="out")
    assert sniroute.metric(moved) == sniroute.metric(moved, handoff=handoff)
    assert handoff == sniroute.status()["handoff"]["chosen"]


def test_flows_are_counted(engine: Engine, run_app: RunApp, sniroute: Sniroute) -> None:
    """
    A connection that is translated has a place among the flows, and the router has no socket of it.
    """
    host = "one.example.test"
    app = run_app("one", {"sniroute.host": host})
    sniroute.wait_for_route(host, app.address)
    before = sniroute.metric("sniroute_packet_flows")
    sockets = sniroute.router().num_fds()

    with fetch.connect(engine.client, engine.front, host, app.root) as sock:
        assert BLOB == fetch.get(sock, host, "/blob")

        assert before + 1 == sniroute.metric("sniroute_packet_flows")
        assert sockets == sniroute.router().num_fds()
        assert 1 == sniroute.metric("sniroute_connections_active", route=host, handoff="packet")
    assert 0 == sniroute.metric("sniroute_packet_lost_events_total")
    assert 65536 == sniroute.metric("sniroute_packet_max_flows")


@EACH_CLIENT
def test_a_name_nobody_has_is_refused_with_unrecognized_name(
    engine: Engine, run_app: RunApp, sniroute: Sniroute, client: str
) -> None:
    """
    Every client is told that the name is the trouble, though another name would be served.
    """
    app = run_app("one", {"sniroute.host": "one.example.test"})
    sniroute.wait_for_route("one.example.test", app.address)
    fetch_page, _ = fetch.CLIENTS[client]

    with pytest.raises(fetch.RefusedError, match=re.compile("unrecognized.name", re.IGNORECASE)):
        fetch_page(engine.client, engine.front, "other.example.test", app.root)
