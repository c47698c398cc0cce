"""
The session: what it says to do, told as plays, and what holds in every order of events.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.core.session import Abort, Close, Command, Drain, HalfClose, Session, Side

CLIENT, BACKEND = Side.CLIENT, Side.BACKEND

Event = tuple[str, Side | str]


def ended(side: Side) -> Event:
    return "ended", side


def drained(side: Side) -> Event:
    return "drained", side


def failed(reason: str) -> Event:
    return "failed", reason


PLAYS: dict[str, tuple[str, list[tuple[Event, list[Command]]]]] = {
    "each end closes in its turn": (
        "client_fin",
        [
            (ended(CLIENT), [Drain(CLIENT)]),
            (drained(CLIENT), [HalfClose(BACKEND)]),
            (ended(BACKEND), [Drain(BACKEND)]),
            (drained(BACKEND), [Close()]),
        ],
    ),
    "the backend closes first": (
        "backend_fin",
        [
            (ended(BACKEND), [Drain(BACKEND)]),
            (drained(BACKEND), [HalfClose(CLIENT)]),
            (ended(CLIENT), [Drain(CLIENT)]),
            (drained(CLIENT), [Close()]),
        ],
    ),
    "both end before either is drained": (
        "backend_fin",
        [
            (ended(BACKEND), [Drain(BACKEND)]),
            (ended(CLIENT), [Drain(CLIENT)]),
            (drained(CLIENT), [HalfClose(BACKEND)]),
            (drained(BACKEND), [Close()]),
        ],
    ),
    "an end that is heard of twice is drained once": (
        "client_fin",
        [
            (ended(CLIENT), [Drain(CLIENT)]),
            (ended(CLIENT), []),
            (drained(CLIENT), [HalfClose(BACKEND)]),
            (drained(CLIENT), []),
            (ended(CLIENT), []),
        ],
    ),
    "a side that has not ended is never drained": (
        "client_fin",
        [
            (drained(CLIENT), []),
            (drained(BACKEND), []),
            (ended(CLIENT), [Drain(CLIENT)]),
            (drained(BACKEND), []),
        ],
    ),
    "a reset is passed on at once": (
        "client_rst",
        [(failed("client_rst"), [Abort()]), (ended(CLIENT), []), (failed("backend_rst"), [])],
    ),
    "a reset overtakes what waits to drain": (
        "backend_rst",
        [
            (ended(CLIENT), [Drain(CLIENT)]),
            (failed("backend_rst"), [Abort()]),
            (drained(CLIENT), []),
        ],
    ),
    "a reset after the close is no news": (
        "client_fin",
        [
            (ended(CLIENT), [Drain(CLIENT)]),
            (drained(CLIENT), [HalfClose(BACKEND)]),
            (ended(BACKEND), [Drain(BACKEND)]),
            (drained(BACKEND), [Close()]),
            (failed("client_rst"), []),
            (ended(CLIENT), []),
        ],
    ),
}

EVENTS = st.one_of(
    st.builds(ended, st.sampled_from(Side)),
    st.builds(drained, st.sampled_from(Side)),
    st.builds(failed, st.just("cut")),
)


def tell(session: Session, event: Event) -> list[Command]:
    kind, about = event
    return list(getattr(session, kind)(about))


@pytest.mark.parametrize(("reason", "play"), PLAYS.values(), ids=PLAYS)
def test_play(reason: str, play: list[tuple[Event, list[Command]]]) -> None:
    """
    Each event is answered by exactly these commands, and the end has this reason.
    """
    session = Session()

    commands = [tell(session, event) for event, _ in play]

    assert [expected for _, expected in play] == commands
    assert reason == session.reason


@given(st.lists(EVENTS, max_size=20))
def test_a_fin_is_never_passed_on_before_the_bytes(events: list[Event]) -> None:
    """
    In no order of events does a side get its FIN before all that the other sent is written.
    """
    session, ended_sides, drained_sides = Session(), set(), set()

    for kind, about in events:
        if kind == "ended":
            ended_sides.add(about)
        # only of what has ended can it be known that nothing is left
        if kind == "drained" and about in ended_sides:
            drained_sides.add(about)
        for command in tell(session, (kind, about)):
            if isinstance(command, HalfClose):
                assert command.side.other in drained_sides
            if isinstance(command, Close):
                assert set(Side) == drained_sides


@given(st.lists(EVENTS, max_size=20))
def test_a_play_has_one_end(events: list[Event]) -> None:
    """
    A play ends in at most one Close or Abort, nothing comes after it, and `over` says so.
    """
    session = Session()

    commands = [command for event in events for command in tell(session, event)]

    ends = [isinstance(command, Close | Abort) for command in commands]
    assert ends.count(True) == (1 if session.over else 0)
    assert not any(ends[:-1])


@given(st.permutations([ended(CLIENT), ended(BACKEND), drained(CLIENT), drained(BACKEND)]))
def test_every_ended_side_is_drained_and_closed(events: list[Event]) -> None:
    """
    Whatever comes first: once both sides have ended and are drained, the connection closes.
    """
    session = Session()

    for event in events:
        tell(session, event)
    last = [tell(session, drained(side)) for side in Side if session.waits_to_drain(side)]

    assert session.over
    assert not last or last[-1] == [Close()]


@pytest.mark.parametrize("side", list(Side))
def test_waits_to_drain_between_the_end_and_the_last_byte(side: Side) -> None:
    """
    A side waits to drain from its end until all its bytes are written, the other side does not.
    """
    session = Session()
    before = session.waits_to_drain(side)
    session.ended(side)
    between = session.waits_to_drain(side), session.waits_to_drain(side.other)
    session.drained(side)

    assert (False, (True, False), False) == (before, between, session.waits_to_drain(side))
