"""
Connections that make their steps together: what befalls one befalls no other.
"""

import socket
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from controller.router.address import socket_address
from controller.router.batch import TOGETHER, Batch
from controller.router.connection import DIAL
from controller.router.flow import Flow, Handoff, Offer, Refused
from controller.router.loop import Loop

LOOPBACK = socket.inet_aton("127.0.0.1")


class Taker(Handoff):
    """
    Takes what is offered, or says that it does not; an *error* meets all.
    """

    def __init__(self, name: str, *, refuses: bool, error: Exception | None = None) -> None:
        self.name = name
        self.refuses = refuses
        self.error = error
        self.offered = 0

    def take_all(self, offers: Sequence[Offer]) -> list[Any]:
        """
        Refuse, or hand out something.
        """
        self.offered += len(offers)
        if self.error:
            raise self.error
        return [Refused("no") if self.refuses else "a flow" for _ in offers]


class Made:
    """
    A connection that only notes what it hears; it *fails* in one of its steps.
    """

    def __init__(self, port: int, fails: str = "") -> None:
        self.port = port
        self.fails = fails
        self.result = ""
        self.offer: Offer | None = None
        self.dialled = 0
        self.taken: list[str] = []

    def _step(self, name: str) -> None:
        if name == self.fails:
            raise ZeroDivisionError(name)

    def write_dial(self, dials: Any, at: int) -> None:
        """
        Ask for a connection from anywhere.
        """
        self._step("write_dial")
        DIAL.pack_into(dials, at, socket_address(LOOPBACK, self.port), b"", 16, -1, 0)

    def on_dialled(self, fd: int, connected: int) -> None:
        """
        Go on, if there is a backend.
        """
        self.dialled = fd
        self._step("on_dialled")
        if fd < 0:
            self.result = "refused"
        else:
            assert connected
            self.batch.hand_over(self)

    def make_offer(self) -> None:
        """
        Offer what is connected.
        """
        self._step("make_offer")
        self.offer = Offer(-1, self.dialled, lambda _: None)

    def may_have(self, _: Handoff) -> bool:
        """
        Take any.
        """
        return True

    def on_taken(self, handoff: Handoff, taken: Flow | Exception | str) -> None:
        """
        Note who took it.
        """
        self._step("on_taken")
        if isinstance(taken, Refused):
            return
        self.offer = None
        if isinstance(taken, Exception):
            raise taken
        self.taken.append(handoff.name)

    def cut(self, reason: str) -> None:
        """
        End.
        """
        self.offer, self.result = None, reason


@pytest.fixture
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0), backlog=4 * TOGETHER) as listener:
        yield listener.getsockname()[1]


def run(ladder: list[Handoff], connections: list[Made]) -> Loop:
    loop = Loop()
    settings = SimpleNamespace(receive_buffer=0)
    batch = Batch(SimpleNamespace(loop=loop, settings=settings, ladder=ladder))
    for connection in connections:
        connection.batch = batch
        batch.dial(connection)
    loop.turn(0)
    for connection in connections:
        if connection.dialled > 0:
            loop.close(connection.dialled)
    loop.turn(0)
    return loop


def test_more_than_fit_are_all_served(port: int) -> None:
    """
    Whoever does not fit makes the step next; whom the first rung refuses comes to the second.
    """
    ladder: list[Handoff] = [Taker("first", refuses=True), Taker("second", refuses=False)]
    connections = [Made(port) for _ in range(2 * TOGETHER + 1)]

    run(ladder, connections)

    assert [["second"]] * len(connections) == [c.taken for c in connections]


@pytest.mark.parametrize("step", ["write_dial", "on_dialled", "make_offer", "on_taken"])
def test_a_fault_costs_one_connection(step: str, port: int) -> None:
    """
    The one whose step it is, with others before and behind it.
    """
    connections = [Made(port), Made(port, step), Made(port)]

    loop = run([Taker("only", refuses=False)], connections)

    assert ["", "internal_error", ""] == [c.result for c in connections]
    assert [["only"], [], ["only"]] == [c.taken for c in connections]
    assert loop.faults == 1


def test_a_backend_that_refuses_is_one_connections(port: int) -> None:
    """
    The error is told to whose backend it was.
    """
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nobody = gone.getsockname()[1]
    connections = [Made(port), Made(nobody), Made(port)]

    run([Taker("only", refuses=False)], connections)

    assert ["", "refused", ""] == [c.result for c in connections]


def test_a_fault_of_a_rung_leaves_nobody_waiting(port: int) -> None:
    """
    All that were offered are cut.
    """
    connections = [Made(port), Made(port)]

    run([Taker("only", refuses=False, error=ZeroDivisionError())], connections)

    assert ["internal_error"] * 2 == [c.result for c in connections]


def test_who_is_cut_between_two_steps_makes_no_more(port: int) -> None:
    """
    It has a result by then.
    """
    connections = [Made(port), Made(port)]
    connections[1].result = "killed"

    run([Taker("only", refuses=False)], connections)

    assert [["only"], []] == [c.taken for c in connections]
    assert connections[1].dialled == 0
