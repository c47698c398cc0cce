"""
Questions about connections: told in pages and killed in handfuls, in the loop's own thread.
"""

import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from controller.router._native import ffi

from controller.core.routes import Backend, Route
from controller.core.wire import PAGE, Message, WireError
from controller.router.connection import Connection
from controller.router.control import HANDFUL, Control, Peer, listen
from controller.router.flow import Flow
from controller.router.loop import Loop
from controller.router.packet import PacketHandoff
from controller.router.router import Router
from controller.settings import RouterSettings

BACKEND = Backend("web", "docker", "198.51.100.2", 443)


class StillFlow(Flow):
    """
    A flow that has moved 3 bytes in and 5 out, and takes note of its end.
    """

    handoff = "packet"

    def __init__(self) -> None:
        self.cuts: list[tuple[str, int]] = []

    def bytes(self, side: int) -> int:  # noqa: D102 - as the base class's
        return (3, 5)[side]

    def quiet(self) -> float:  # noqa: D102 - as the base class's
        return 1.5

    def cut(self, reason: str) -> None:  # noqa: D102 - as the base class's
        self.cuts.append((reason, threading.get_ident()))


class Switch:
    """
    A packet hand-off that can only be switched.
    """

    def __init__(self) -> None:
        self.state = "on"

    def on(self) -> None:
        """
        Refuse, as one that is taken down does.
        """
        if self.state == "off":
            raise ValueError("detached")

    def off(self) -> None:
        """
        Take note.
        """
        self.state = "off"

    def status(self) -> dict[str, Any]:
        """
        Tell it.
        """
        return {"state": self.state, "flows": 7}


class Desk:
    """
    A control socket's answers, with the router's loop in a thread.
    """

    def __init__(self, folder: Path) -> None:
        self.router = Router(RouterSettings(), Loop(), 8)
        path = folder / "router.sock"
        self._control = Control(self.router, listen(path), path, "0")
        self.loop = threading.Thread(target=self.router.loop.run)
        self.loop.start()

    def ask(self, **question: Any) -> Message:
        """
        Ask as a peer does.
        """
        answer = self._control.answer(cast("Peer", None), question)
        assert answer is not None
        return answer

    def enter(self, count: int) -> None:
        """
        Have *count* connections under way.
        """
        arrival = ffi.new("struct arrival *", {"peer": {"size": 4, "port": 50000}})
        for _ in range(count):
            connection = Connection(self.router, -1, arrival, 0.0)
            connection.backend, connection.route = BACKEND, Route("*.example.com", (BACKEND,))
            connection.flow = StillFlow()
            self.router.connections[connection.id] = connection

    def close(self) -> None:
        """
        End the loop and the control socket.
        """
        self.router.loop.ask(partial(setattr, self.router.loop, "stopping", True))
        self.loop.join()
        self._control.close()


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path)
    yield desk
    desk.close()


def test_a_connection_is_told_as_far_as_it_has_come(desk: Desk) -> None:
    """
    One that is handed over has it all, one that waits for its hello has a client alone.
    """
    desk.enter(2)
    waits = desk.router.connections[2]
    waits.route = waits.backend = waits.flow = None

    told, pending = desk.ask(type="connections", after=0)["connections"]

    assert 0 < told.pop("age")
    assert {
        "id": 1,
        "route": "*.example.com",
        "client": "0.0.0.0",
        "client_port": 50000,
        "backend": "web",
        "backend_address": "198.51.100.2",
        "backend_port": 443,
        "handoff": "packet",
        "bytes_in": 3,
        "bytes_out": 5,
        "quiet": 1.5,
    } == told
    empty = [key for key, value in pending.items() if value in (None, 0)]
    assert ["id", "client", "client_port", "age"] == [key for key in pending if key not in empty]


def test_many_connections_are_told_in_pages(desk: Desk) -> None:
    """
    Each page goes on after the last, none is told twice, and one that ends meanwhile is left out.
    """
    desk.enter(2 * PAGE + 5)
    first = desk.ask(type="connections", after=0)
    for i in (3, PAGE, PAGE + 1):
        del desk.router.connections[i]
    pages = [first]
    while pages[-1]["more"]:
        pages.append(desk.ask(type="connections", after=pages[-1]["connections"][-1]["id"]))
    told = [one["id"] for page in pages for one in page["connections"]]

    assert [PAGE, PAGE, 4] == [len(page["connections"]) for page in pages]
    assert [i for i in range(1, 2 * PAGE + 6) if i != PAGE + 1] == told


def test_a_page_that_is_just_full_is_the_last(desk: Desk) -> None:
    """
    No empty page follows a full one.
    """
    desk.enter(PAGE)

    assert False is desk.ask(type="connections", after=0)["more"]
    assert [] == desk.ask(type="connections", after=PAGE)["connections"]


def test_those_that_are_named_are_killed(desk: Desk) -> None:
    """
    Each once and in the loop's thread, however many and however often they are named.
    """
    count = 2 * HANDFUL + 1
    desk.enter(count + 1)
    named = [*range(1, count + 1), 1, 99999]

    answer = desk.ask(type="kill", ids=named)
    cuts = [cast("StillFlow", c.flow).cuts for c in desk.router.connections.values()]

    assert {*range(1, count + 1)} == set(answer["killed"])
    assert [] == cuts.pop()
    assert {("killed", desk.loop.ident)} == {cut for each in cuts for cut in each}


def test_the_packet_hand_off_is_switched(desk: Desk) -> None:
    """
    Off and on are told to it, and the answer is how it is then, or why not.
    """
    desk.router.packet = cast("PacketHandoff", Switch())

    assert {"state": "on", "flows": 7} == desk.ask(type="packet", state="on")["packet"]
    assert {"state": "off", "flows": 7} == desk.ask(type="packet", state="off")["packet"]
    assert {"state": "off", "flows": 7} == desk.ask(type="packet", state="status")["packet"]
    assert {"type": "packet", "error": "detached"} == desk.ask(type="packet", state="on")


@pytest.mark.parametrize("state", ["on", "off", "status"])
def test_without_the_packet_hand_off_the_reason_is_told(state: str, desk: Desk) -> None:
    """
    Where it is not in use, each question is answered with why.
    """
    desk.router.packet_reason = "not asked for"

    error = "the packet hand-off is not in use here: not asked for"
    assert {"type": "packet", "error": error} == desk.ask(type="packet", state=state)


@pytest.mark.parametrize(
    ("question", "where"),
    [
        ({"type": "connections"}, "connections: missing or unknown: after"),
        ({"type": "connections", "after": -1}, "connections.after: not an id: -1"),
        ({"type": "connections", "after": None}, "connections.after: not an id"),
        ({"type": "connections", "after": 0, "limit": 5}, "connections: missing or unknown: limit"),
        ({"type": "kill"}, "kill: missing or unknown: ids"),
        ({"type": "kill", "ids": 7}, "ids: not a list"),
        ({"type": "kill", "ids": [7, "8"]}, "ids[1]: not an id: '8'"),
        ({"type": "kill", "ids": [True]}, "ids[0]: not an id: True"),
        ({"type": "packet"}, "packet: missing or unknown: state"),
        ({"type": "packet", "state": "ON"}, "packet.state: no such word: 'ON'"),
        ({"type": "packet", "state": ["on"]}, "packet.state: not a string"),
    ],
)
def test_a_question_that_is_wrong_changes_nothing(
    question: Message, where: str, desk: Desk
) -> None:
    """
    It is refused by the name of the member, and nothing is killed for the half that is right.
    """
    desk.enter(8)
    with pytest.raises(WireError) as refusal:
        desk.ask(**question)

    assert where in str(refusal.value)
    assert [] == [c.id for c in desk.router.connections.values() if cast("StillFlow", c.flow).cuts]
