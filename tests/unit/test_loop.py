"""
The event loop: what is called when, and that a closed descriptor's number meets nobody.
"""

import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from controller.router.loop import Loop

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def pair() -> Iterator[Pair]:
    """
    Two ends of a TCP connection, which can be reset.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    far.settimeout(10)
    yield near, far
    near.close()
    far.close()


def turn_until(loop: Loop, calls: list[object], count: int = 1) -> None:
    end = time.monotonic() + 10
    while len(calls) < count:
        assert time.monotonic() < end, "not called within 10 s"
        loop.turn(0.1)


def test_timers_go_off_in_the_order_they_are_due(loop: Loop) -> None:
    """
    The earlier timer goes first, whichever was set first, and none before its time.
    """
    calls: list[tuple[str, float]] = []
    start = loop.now
    for name, seconds in (("late", 0.04), ("early", 0.02)):
        loop.later(seconds, lambda name=name: calls.append((name, time.monotonic() - start)))

    turn_until(loop, calls, 2)

    assert ["early", "late"] == [name for name, _ in calls]
    assert all(at >= due for (_, at), due in zip(calls, (0.02, 0.04), strict=True))


def test_a_cancelled_timer_stays_silent(loop: Loop) -> None:
    """
    A cancelled timer is not called, and the one behind it is.
    """
    calls: list[str] = []
    loop.later(0, lambda: calls.append("cancelled")).cancel()
    loop.later(0.01, lambda: calls.append("kept"))

    turn_until(loop, calls)

    assert ["kept"] == calls


def test_a_timer_that_is_cancelled_in_its_own_round_stays_silent(loop: Loop) -> None:
    """
    Of two timers due at once, the first can still cancel the second.
    """
    calls: list[str] = []
    first = loop.later(0, lambda: (calls.append("first"), second.cancel()))
    second = loop.later(0.001, lambda: calls.append("second"))
    end = second.due
    while time.monotonic() <= end:
        pass

    loop.turn(0)

    assert first.due < end
    assert ["first"] == calls


def test_soon_is_the_next_round(loop: Loop) -> None:
    """
    What is to come soon comes in the next round, which does not wait for anything.
    """
    calls: list[str] = []
    loop.soon(lambda: (calls.append("first"), loop.soon(lambda: calls.append("second"))))

    loop.turn(None)
    after_one = list(calls)
    loop.turn(None)

    assert ["first"] == after_one
    assert ["first", "second"] == calls


def test_a_closed_descriptor_is_heard_of_no_more(loop: Loop, pair: Pair) -> None:
    """
    Closing in a round drops the events of that round, and the number is free only after it.
    """
    near, far = pair
    other, peer = socket.socketpair()
    heard: list[str] = []
    fds = {"near": near.detach(), "other": other.detach()}

    def give_up(name: str) -> None:
        heard.append(name)
        for fd in fds.values():
            loop.close(fd)
        # both numbers are still taken: whatever is opened in this round gets another one
        fresh = os.dup(peer.fileno())
        heard.append("new number" if fresh not in fds.values() else "a number in use")
        os.close(fresh)

    for name, fd in fds.items():
        loop.watch(fd, select.EPOLLIN, lambda _, name=name: give_up(name))
    far.send(b"x")
    peer.send(b"x")

    loop.turn(1)

    assert heard[0] in fds
    assert ["new number"] == heard[1:]
    assert not [fd for fd in fds.values() if Path(f"/proc/self/fd/{fd}").exists()]
    peer.close()


def test_close_with_reset_sends_a_rst(loop: Loop, pair: Pair) -> None:
    """
    A descriptor closed with a reset ends its peer with ECONNRESET, not with an end.
    """
    near, far = pair
    loop.close(near.detach(), reset=True)

    loop.turn(0)

    with pytest.raises(ConnectionResetError):
        far.recv(1)


def test_forget_leaves_the_descriptor_open(loop: Loop, pair: Pair) -> None:
    """
    What is forgotten is heard of no more, and still works.
    """
    near, far = pair
    heard: list[int] = []
    loop.watch(near.fileno(), select.EPOLLIN, heard.append)
    loop.forget(near.fileno())
    far.send(b"x")

    loop.turn(0.05)

    assert [] == heard
    assert near.recv(1) == b"x"


def test_rearm_tells_what_holds_already(loop: Loop, pair: Pair) -> None:
    """
    Asking for another event of an edge-triggered descriptor tells of what already is so.
    """
    near, _ = pair
    heard: list[int] = []
    loop.watch(near.fileno(), select.EPOLLIN | select.EPOLLET, heard.append)
    loop.turn(0)

    loop.rearm(near.fileno(), select.EPOLLOUT | select.EPOLLET)
    loop.turn(1)

    assert [select.EPOLLOUT] == heard


def test_the_end_of_a_round_comes_after_the_closing(loop: Loop, pair: Pair) -> None:
    """
    What waits for the end of a round finds the round's descriptors closed.
    """
    near, far = pair
    seen: list[bytes] = []
    far.setblocking(False)
    loop.round_ends.append(lambda: seen.append(far.recv(1)))
    loop.close(near.detach())

    loop.turn(0)

    assert [b""] == seen


def test_a_socket_that_is_given_up_twice_is_closed_once(loop: Loop, pair: Pair) -> None:
    """
    A fault in what follows a close has the connection cut: its number must not meet another's.
    """
    near, far = pair
    number = near.detach()
    loop.close(number)
    loop.close(number, reset=True)
    loop.vanish(number)

    loop.turn(0)

    assert b"" == far.recv(1)


def test_a_descriptor_that_is_none_is_no_small_matter(loop: Loop, pair: Pair) -> None:
    """
    Whoever closes a number that was closed in an earlier round may meet a stranger.
    """
    near, _ = pair
    number = near.detach()
    loop.close(number)
    loop.turn(0)
    loop.close(number)

    with pytest.raises(OSError, match="Bad file descriptor"):
        loop.turn(0)


def test_run_goes_on_until_stopping(loop: Loop, pair: Pair) -> None:
    """
    The loop ends with the round in which it was told to stop, closing what that round gave up.
    """
    near, far = pair
    linger = struct.pack("ii", 0, 0)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    fd = near.detach()

    def stop() -> None:
        loop.close(fd)
        loop.stopping = True

    loop.later(0.01, stop)
    loop.run()

    assert far.recv(1) == b""


class Faulty:
    """
    Someone whose handler fails.
    """

    def __init__(self) -> None:
        self.ends: list[str] = []

    def fail(self, *_: int) -> None:
        """
        Fail.
        """
        raise ZeroDivisionError

    def cut(self, reason: str) -> None:
        """
        Take note of the end.
        """
        self.ends.append(reason)


def test_a_fault_costs_only_who_met_it(loop: Loop) -> None:
    """
    A handler or a timer that fails is counted and its owner cut; the others go on.
    """
    calls: list[str] = []
    by_event, by_timer = Faulty(), Faulty()
    reading, writing = os.pipe()
    os.write(writing, b"x")
    loop.watch(reading, select.EPOLLIN | select.EPOLLET, by_event.fail)
    loop.later(0, by_timer.fail)
    loop.later(0.001, lambda: calls.append("other"))

    turn_until(loop, calls)
    loop.close(reading)
    loop.turn(0)
    os.close(writing)

    assert ["internal_error"] == by_event.ends == by_timer.ends
    assert loop.faults == 2


def test_a_fault_behind_a_partial_finds_its_owner(loop: Loop) -> None:
    """
    Whose method it is counts, also where the call has arguments of its own.
    """
    faulty = Faulty()
    loop.soon(partial(faulty.fail, 1))
    loop.turn(0)

    assert ["internal_error"] == faulty.ends


def test_a_fault_at_the_end_of_a_round_is_no_end_of_the_loop(loop: Loop) -> None:
    """
    What else waits for the end of a round is called nevertheless.
    """
    calls: list[str] = []
    loop.round_ends += [Faulty().fail, lambda: calls.append("other")]
    loop.turn(0)

    assert (["other"], 1) == (calls, loop.faults)


# --- other threads ---


@pytest.fixture
def asker() -> Iterator[ThreadPoolExecutor]:
    """
    Another thread.
    """
    with ThreadPoolExecutor(1) as asker:
        yield asker


def test_another_thread_is_answered_in_the_loop(loop: Loop, asker: ThreadPoolExecutor) -> None:
    """
    The loop wakes for a question, and answers it in its own thread.
    """
    answer = asker.submit(loop.ask, threading.get_ident)
    loop.turn(10)

    assert threading.get_ident() == answer.result(10)


def test_a_question_that_fails_is_the_askers(loop: Loop, asker: ThreadPoolExecutor) -> None:
    """
    The error of a question is raised where it was asked, and is no fault of the loop.
    """
    answer = asker.submit(loop.ask, Faulty().fail)
    loop.turn(10)

    with pytest.raises(ZeroDivisionError):
        answer.result(10)
    assert loop.faults == 0


def test_a_loop_that_does_not_turn_is_told_of_in_time(loop: Loop) -> None:
    """
    Whoever asks waits no longer than it says.
    """
    with pytest.raises(TimeoutError):
        loop.ask(threading.get_ident, 0.01)
