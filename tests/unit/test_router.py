"""
What a router decides for its connections, without a socket.
"""

from collections.abc import Sequence

import pytest
from controller.router._native import ffi

from controller.core.routes import Backend
from controller.router.connection import Connection
from controller.router.flow import Handoff
from controller.router.loop import Loop
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

    assert expected == [rung.name for rung in router.rungs(connection(router, backend))]
