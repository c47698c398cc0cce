"""
What time tells of backends and clients: learned once, bounded, and forgotten with its reason.
"""

import socket
import time
from collections.abc import Iterator

import pytest

from controller.core.clientip import Choice
from controller.core.routes import Backend, Route, RouteTable
from controller.router import transparency
from controller.router.transparency import NO_REPLY, Transparency
from controller.settings import RouterSettings

BACKEND = Backend("app", "docker", "198.51.100.2", 443, address6="2001:db8:1::2")
OTHER = Backend("other", "docker", "198.51.100.3", 443)
TRANSPARENT = Choice(transparent=True)
LEARNED = Choice(transparent=False, reason="no_reply")


def address(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)


GOOD, STRAY = address("203.0.113.1"), address("203.0.113.9")


@pytest.fixture
def known() -> Iterator[Transparency]:
    """
    A router's knowledge, its plumbing standing.
    """
    known = Transparency(RouterSettings())
    known._say(True, "laid")  # noqa: SLF001 - as `start` and the watch do
    return known


def goes_astray(known: Transparency, client: bytes, backend: Backend = BACKEND) -> None:
    """
    Have the backend answer only to our own address, for a client that came just now.
    """
    known.connected(client, backend, NO_REPLY, time.monotonic())


def prove(known: Transparency, *clients: bytes) -> None:
    for client in clients:
        known.connected(client, BACKEND, TRANSPARENT, time.monotonic())


def test_a_backend_that_does_not_answer_is_learned(known: Transparency) -> None:
    """
    After one connection every client is spared the wait.
    """
    goes_astray(known, STRAY)

    assert [LEARNED, LEARNED] == [known.choose(client, BACKEND) for client in (GOOD, STRAY)]


def test_a_client_whose_replies_go_astray_waits_once(known: Transparency) -> None:
    """
    Of a backend that has answered to others the client is remembered, and no one else.
    """
    prove(known, GOOD)
    before = known.choose(STRAY, BACKEND)
    goes_astray(known, STRAY)

    assert before == TRANSPARENT
    assert LEARNED == known.choose(STRAY, BACKEND)
    assert TRANSPARENT == known.choose(GOOD, BACKEND)
    assert TRANSPARENT == known.choose(STRAY, OTHER)


@pytest.mark.parametrize(
    ("client", "choice"), [("2001:db8:7::ffff", LEARNED), ("2001:db8:7:1::1", TRANSPARENT)]
)
def test_an_ipv6_client_is_its_network(known: Transparency, client: str, choice: Choice) -> None:
    """
    Who changes its address within its /64 does not wait again; a neighbour of it is another.
    """
    prove(known, address("2001:db8:8::1"))
    goes_astray(known, address("2001:db8:7::1"))

    assert choice == known.choose(address(client), BACKEND)


def test_only_so_many_clients_are_remembered(
    known: Transparency, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The one that has not come for longest is forgotten first.
    """
    monkeypatch.setattr(transparency, "MAX_ASTRAY", 2)
    first, second, third = (address(f"203.0.113.{n}") for n in (11, 12, 13))
    prove(known, GOOD)
    goes_astray(known, first)
    goes_astray(known, second)
    known.choose(first, BACKEND)
    goes_astray(known, third)

    assert [LEARNED, TRANSPARENT, LEARNED] == [
        known.choose(client, BACKEND) for client in (first, second, third)
    ]


def test_a_new_table_has_clients_tried_again(known: Transparency) -> None:
    """
    With a table the way of replies may have changed.
    """
    prove(known, GOOD)
    goes_astray(known, STRAY)
    known.keep(RouteTable(2, [Route("app.example.com", (BACKEND,))]))

    assert TRANSPARENT == known.choose(STRAY, BACKEND)


@pytest.mark.parametrize("proven", [(), (GOOD,)], ids=["backend", "client"])
def test_a_repair_has_all_tried_again(known: Transparency, proven: tuple[bytes, ...]) -> None:
    """
    What was learned while the plumbing was broken is forgotten when it stands again.

    So is what a connection from before tells only after.
    """
    prove(known, *proven)
    goes_astray(known, STRAY)
    before = time.monotonic()
    known._say(False, "gone")  # noqa: SLF001 - as the watch does
    known._say(True, "laid again")  # noqa: SLF001 - as above
    forgotten = known.choose(STRAY, BACKEND)
    known.connected(STRAY, BACKEND, NO_REPLY, before)

    assert TRANSPARENT == forgotten == known.choose(STRAY, BACKEND)
