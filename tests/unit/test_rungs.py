"""
Hand-offs that take several connections at once: what befalls one befalls no other.
"""

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import count, islice
from types import SimpleNamespace
from typing import Any

import pytest

from bpfprog.packet import Installed
from controller.router import packet
from controller.router.flow import Offer, Refused, forgotten
from controller.router.loop import Loop
from controller.router.packet import CROWDED, REAPED_TOGETHER, SETTLED, PacketFlow, PacketHandoff
from controller.router.sockmap import SockmapFlow, SockmapHandoff

ENTRY = bytes(36)


class Programs:
    """
    Stands for the packet programs: installs *answers*, and knows no addresses of flow *without*.
    """

    lost_events = 0

    def __init__(self, *answers: Installed | str, without: int = -1) -> None:
        self.answers = answers
        self.without = without
        self.flows: dict[int, SimpleNamespace] = {}
        self.events_fd = os.eventfd(0)
        self.ended: list[int] = []
        self.reaped: list[int] = []

    def install(self, *_: Any, **__: Any) -> Sequence[Installed | str]:
        """
        Answer.
        """
        return self.answers

    def flow(self, number: int) -> Any:
        """
        Hand out a flow.
        """
        return self.flows.setdefault(number, SimpleNamespace(told=0, serial=number))

    def entry(self, number: int) -> bytes:
        """
        Hand out its addresses, if they are known.
        """
        if number == self.without:
            raise ZeroDivisionError
        return ENTRY

    def end(self, number: int) -> None:
        """
        Take note.
        """
        self.ended.append(number)

    def reap(self, number: int, _: int) -> bool:
        """
        Take note.
        """
        self.reaped.append(number)
        return True


@pytest.fixture(autouse=True)
def no_netfilter(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Be where netfilter tracks nothing.
    """
    monkeypatch.setattr(packet, "_open_conntrack", lambda: None)


def packets(programs: Any) -> PacketHandoff:
    return PacketHandoff(Loop(), programs, 1, 1)


@pytest.mark.parametrize("early", [True, False])
def test_a_fault_with_a_flow_of_packets_ends_that_one(early: bool, monkeypatch: Any) -> None:  # noqa: FBT001
    """
    One that was installed, and has met a fault as early or as late as may be, leaves nothing.
    """
    installed = [Installed(number, sent=True, is_open=number == 1) for number in range(2)]
    programs = Programs(*installed, "mtu", without=1 if early else -1)
    handoff = packets(programs)

    def fail() -> None:
        raise ZeroDivisionError

    # said when the sockets of the one that is open are given up
    monkeypatch.setattr(handoff, "on_freed", fail)
    good, faulty, refused = handoff.take_all([Offer(-1, -1, forgotten)] * 3)

    assert isinstance(good, PacketFlow)
    assert isinstance(faulty, ZeroDivisionError)
    assert isinstance(refused, Refused)
    assert "mtu" == str(refused)
    assert [1] == programs.ended
    assert {0: good} == handoff.flows
    assert 0 == handoff.without_sockets
    handoff.reap_now()
    assert [1] == programs.reaped
    handoff.ports.give_back(ENTRY)
    # only the good one's were left
    with pytest.raises(KeyError):
        handoff.ports.give_back(ENTRY)


def test_in_a_crowd_numbers_are_free_sooner() -> None:
    """
    From CROWDED flows in quarantine on, those that have settled are freed, some at a time.
    """
    programs = Programs()
    handoff = packets(programs)
    numbers = count()

    def end(flows: int, at: float) -> int:
        handoff.loop.now = at
        for number in islice(numbers, flows):
            flow = SimpleNamespace(number=number, native=programs.flow(number), entry=ENTRY)
            handoff.flows[number] = flow
            handoff.ports.take(ENTRY)
            handoff.gone(flow)
        return len(programs.reaped)

    late = 100 + SETTLED
    later = late + SETTLED

    assert 0 == end(CROWDED - 1, 100)
    assert 0 == end(1, late)
    assert CROWDED - 1 == end(1, late)
    # with two left: a look at each end would cost more than it finds
    assert CROWDED - 1 == end(CROWDED + REAPED_TOGETHER - 2, later)
    assert CROWDED + 1 == end(1, later)


@pytest.fixture
def offers() -> Iterator[list[Offer]]:
    """
    Pairs of connected sockets, with a hello in the client's.
    """
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def connected() -> tuple[socket.socket, int]:
            far = stack.enter_context(socket.create_connection(listener.getsockname()))
            near = stack.enter_context(listener.accept()[0])
            near.setblocking(False)
            return far, near.fileno()

        pairs = []
        for _ in range(5):
            (client, here), (_, there) = connected(), connected()
            client.sendall(b"hello")
            pairs.append(Offer(here, there, forgotten))
        yield pairs


def test_a_hello_that_can_not_be_sent_ends_its_flow(
    offers: list[Offer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The client's packets may have gone on already: nothing is left but to reset both ends.
    """
    client, backend, *_ = offers[0]
    over: list[Any] = []
    resets: list[tuple[int, int]] = []
    programs = Programs(Installed(0, sent=False, is_open=False))
    handoff = packets(programs)
    monkeypatch.setattr(handoff, "reset", lambda *end: resets.append(end))

    (flow,) = handoff.take_all([Offer(os.dup(client), os.dup(backend), over.append)])
    handoff.loop.turn(0)

    assert isinstance(flow, PacketFlow)
    assert ([flow], "hello_unsent") == (over, flow.session.reason)
    assert [0] == programs.ended
    assert [(0, 0), (0, 1)] == resets


def test_what_befalls_one_pair_of_a_sockmap(
    offers: list[Offer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    One is joined; the others' backend takes nothing, are refused, have ended, or meet a fault.
    """
    with socket.socket(fileno=os.dup(offers[1].backend)) as broken_backend:
        broken_backend.shutdown(socket.SHUT_WR)
    results = iter((0, -errno.E2BIG, 1, 0))
    left: list[int] = []
    splice: Any = SimpleNamespace(
        addresses=(0, 0),
        events_fd=os.eventfd(0),
        lost_events=0,
        join=lambda pairs, _: [(next(results), (number, number)) for *_, number in pairs],
        leave=left.extend,
    )
    loop = Loop()
    handoff = SockmapHandoff(loop, splice, 1)

    begin = SockmapFlow.__init__

    def stand_for(flow: SockmapFlow, *words: Any) -> None:
        if words[1] == offers[4][:2]:
            raise ZeroDivisionError
        begin(flow, *words)

    monkeypatch.setattr(SockmapFlow, "__init__", stand_for)
    joined, broken, full, ended, faulty = handoff.take_all(offers)

    assert isinstance(joined, SockmapFlow)
    assert isinstance(broken, BrokenPipeError)
    assert isinstance(faulty, ZeroDivisionError)
    for refused, why in ((full, "e2big"), (ended, "backend_ended")):
        assert isinstance(refused, Refused)
        assert why == str(refused)
        # the next hand-off has to know that the hello is with the backend
        assert refused.prelude is not None
        assert (5, 5, 5) == (refused.prelude.taken, refused.prelude.given, refused.prelude.moved)
    assert ended.leave is not None
    loop.turn(0)
    # the one that met a fault; the other is left when its sockets are given up
    assert [3, 3] == left
    ended.leave()
    loop.turn(0)
    assert [3, 3, 2, 2] == left
