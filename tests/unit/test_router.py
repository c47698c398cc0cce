"""
What a router decides for its connections, without a socket.
"""

import errno
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
from controller.router._native import ffi

from controller.core.routes import Backend, Route, RouteTable
from controller.router.adopted import Adopted
from controller.router.connection import DIAL, PORT_TRIES, Connection, Hello
from controller.router.flow import Flow, Handoff
from controller.router.loop import Loop
from controller.router.note import write_note
from controller.router.packet import PacketFlow
from controller.router.relay import RelayHandoff
from controller.router.router import Router
from controller.settings import RouterSettings


class Rung(RelayHandoff):
    """
    A hand-off by another name.
    """

    def __init__(self, loop: Loop, name: str) -> None:
        super().__init__(loop)
        self.name = name


@pytest.fixture
def router() -> Router:
    return Router(RouterSettings(), Loop(), 8)


def ladder(router: Router, names: Sequence[str]) -> list[Handoff]:
    return [Rung(router.loop, name) for name in names]


def connection(router: Router, backend: Backend) -> Connection:
    arrival = ffi.new("struct arrival *")
    arrival.peer.size = 4
    connection = Connection(router, -1, arrival, 0.0)
    connection.backend = backend
    return connection


@pytest.mark.parametrize(
    ("wish", "names", "expected"),
    [
        ("auto", ["packet", "sockmap", "relay"], ["packet", "sockmap", "relay"]),
        ("packet", ["packet", "sockmap", "relay"], ["packet", "sockmap", "relay"]),
        ("sockmap", ["packet", "sockmap", "relay"], ["sockmap", "relay"]),
        ("relay", ["packet", "sockmap", "relay"], ["relay"]),
        ("sockmap", ["packet", "relay"], ["relay"]),
        ("packet", ["sockmap", "relay"], ["sockmap", "relay"]),
        ("packet", ["relay"], ["relay"]),
    ],
)
def test_the_ladder_begins_where_the_backend_wishes(
    wish: str, names: list[str], expected: list[str], router: Router
) -> None:
    """
    Better hand-offs than the backend's wish are left out; one that is not here costs nothing.
    """
    router.ladder = ladder(router, names)
    backend = Backend("app", "docker", "198.51.100.2", 443, handoff=wish)
    wishing = connection(router, backend)

    assert expected == [rung.name for rung in router.ladder if wishing.may_have(rung)]


def test_a_port_of_anothers_is_passed_over_so_often(router: Router) -> None:
    """
    After PORT_TRIES ports of ours the kernel chooses one; after that it is the next backend's turn.
    """
    dialling: Any = SimpleNamespace(dial=lambda _: None)
    choosing: Any = SimpleNamespace(are_apart=False, choose=lambda _: 5000)
    router.batch, router.packet = dialling, SimpleNamespace(is_on=True, ports=choosing)
    first, second = (Backend(name, "docker", "198.51.100.2", 443) for name in ("first", "second"))
    client = connection(router, first)
    client.route = Route("app.example.com", (first, second))
    client._tries = [second]  # noqa: SLF001 - as when the first is dialled
    dials = bytearray(DIAL.size)
    asked = []
    for _ in range(PORT_TRIES + 2):
        client.write_dial(dials, 0)
        asked.append((client.backend, DIAL.unpack(dials)[-1]))
        client.on_dialled(-errno.EADDRINUSE, 0)

    assert [*[(first, 5000)] * PORT_TRIES, (first, 0), (second, 5000)] == asked
    assert {("app.example.com", "eaddrinuse"): 1} == router.stats.connect_errors


class HeldFlow(Flow):
    """
    A flow that only takes note of how it was cut.
    """

    handoff = "relay"

    def __init__(self) -> None:
        self.reason = ""

    def cut(self, reason: str) -> None:  # noqa: D102 - as the base class's
        self.reason = reason


class BodilessFlow(HeldFlow):
    """
    One whose sockets are given up already.
    """

    outlives_sockets = True


def table(generation: int, **alive: list[str]) -> RouteTable:
    return RouteTable(generation, (), (), alive)


def test_a_flow_without_sockets_hears_of_the_end_of_its_container(router: Router) -> None:
    """
    It is cut when its own container has gone; not when another has, nor where sockets tell.
    """
    one = Backend("one", "docker", "198.51.100.2", 443, address6="2001:db8::2")
    flows = {}
    for name, backend, flow in (
        ("gone", one, BodilessFlow()),
        ("with sockets", one, HeldFlow()),
        ("alive", Backend("two", "docker", "198.51.100.3", 443), BodilessFlow()),
        ("of another engine", Backend("one", "podman", "198.51.100.2", 443), BodilessFlow()),
        ("of the file", Backend("one", "file", "198.51.100.2", 443), BodilessFlow()),
    ):
        under_way = connection(router, backend)
        under_way.route = Route(name, (backend,))
        flows[name] = under_way.flow = flow
        router.connections[under_way.id] = under_way
    pending = connection(router, one)
    router.connections[pending.id] = pending

    router.replace_table(table(1, docker=["198.51.100.2", "198.51.100.3"], podman=["198.51.100.2"]))
    router.replace_table(table(2, docker=["198.51.100.3"], podman=["198.51.100.2"]))

    assert {"gone": "backend_gone"} == {n: f.reason for n, f in flows.items() if f.reason}


def test_a_container_that_is_only_not_routed_to_keeps_its_connections(router: Router) -> None:
    """
    What cuts a flow is that its address is gone, not that its route is.
    """
    backend = Backend("one", "docker", "198.51.100.2", 443)
    under_way = connection(router, backend)
    under_way.route = Route("one", (backend,))
    flow = under_way.flow = BodilessFlow()
    router.connections[under_way.id] = under_way
    alive = {"docker": ["198.51.100.2"]}

    router.replace_table(RouteTable(1, [under_way.route], (), alive))
    router.replace_table(RouteTable(2, (), (), alive))

    assert "" == flow.reason


class LeftFlow(BodilessFlow):
    """
    A flow that an earlier router has left.
    """

    endpoints = (b"\xcb\x00\x71\x07", 50000), (b"\xc6\x33\x64\x02", 443)


def adopted(router: Router, backend: Backend) -> Adopted:
    noted = connection(router, backend)
    noted.route, noted.hello = Route("one.example.com", (backend,)), Hello("one.example.com")
    noted.client = b"\xcb\x00\x71\x07", 50000
    return Adopted(router, cast("PacketFlow", LeftFlow()), write_note(noted.note()))


def test_an_adopted_flow_whose_container_went_meanwhile_is_cut(router: Router) -> None:
    """
    The first table of a router tells what ended while there was none.
    """
    flows = {}
    for source in ("docker", "podman", "file"):
        left = adopted(router, Backend("one", source, "198.51.100.2", 443))
        router.connections[left.id] = left
        flows[source] = left.flow

    router.replace_table(table(1, docker=[], podman=["198.51.100.2"]))

    assert {"docker": "backend_gone", "podman": "", "file": ""} == {
        source: cast("HeldFlow", flow).reason for source, flow in flows.items()
    }
