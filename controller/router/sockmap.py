"""
The `sockmap` hand-off: the kernel moves the bytes, within a bound.

The hello is sent on by hand before the sockets are joined: for it alone the kernel would have to
wake a worker.  What does not go that way, or comes meanwhile, is the kernel's.

A direction is fast while BPF redirects all of it.  When its destination lags by more than the
limit, BPF passes segments to user space and says so once; `advance` then moves them, in order
behind what the kernel still holds, until it has caught up and BPF redirects again.
"""

import errno
import os
import select
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from bpfprog import MAX_CONNECTIONS, Joined, Splice
from controller.core.session import BACKEND, CLIENT, Side
from controller.router._native import ffi, lib
from controller.router.flow import (
    ENDED,
    FIRST_RETRY,
    LAST_RETRY,
    Flow,
    Handoff,
    Offer,
    Prelude,
    Refused,
)
from controller.router.loop import Loop, Timer

_SYN: Final = 1

TURN: Final = 4 * 1024 * 1024
"""Bytes that one slow direction may move before others have their turn."""


class SockmapHandoff(Handoff):
    """
    The rung: a loaded program, and the numbers of the connections in it.
    """

    name = "sockmap"

    def __init__(self, loop: Loop, splice: Splice, backlog_limit: int) -> None:
        self.loop = loop
        self.splice = splice
        self._limit = backlog_limit
        self._free = list(range(MAX_CONNECTIONS - 1, -1, -1))
        self._flows: dict[int, SockmapFlow] = {}
        self._left: list[tuple[int, tuple[int, int]]] = []
        self._lost_events = 0
        counts, consumed = splice.addresses
        self.joined = ffi.new(
            "struct joined *",
            (ffi.cast("struct counts *", counts), ffi.cast("uint64_t *", consumed)),
        )
        loop.round_ends.append(self._leave)
        loop.watch(splice.events_fd, select.EPOLLIN, self._on_events)

    def take_all(self, offers: Sequence[Offer]) -> list[Flow | Exception]:
        """
        Send the hellos on and join the sockets.
        """
        room = min(len(offers), len(self._free))
        sent = self._send_on(offers[:room])
        numbers = iter([self._free.pop() for size in sent if size >= 0])
        pairs = [
            (offer.client, offer.backend, next(numbers))
            for offer, size in zip(offers, sent, strict=False)
            if size >= 0
        ]
        joins = zip(pairs, self.splice.join(pairs, self._limit), strict=True)
        taken: list[Flow | Exception] = [
            OSError(-size, os.strerror(-size))
            if size < 0
            else self._begin(offer, size, *next(joins))
            for offer, size in zip(offers, sent, strict=False)
        ]
        SockmapFlow.watch(self.loop, [flow for flow in taken if isinstance(flow, Flow)], ENDED)
        return taken + [Refused("full") for _ in offers[room:]]

    def take(self, offer: Offer) -> Flow:
        """
        Take one pair, as `take_all` does.
        """
        (taken,) = self.take_all([offer])
        if isinstance(taken, Flow):
            return taken
        raise taken

    @staticmethod
    def _send_on(offers: Sequence[Offer]) -> list[int]:
        """
        Send the hellos on; how much of each went, or -errno.
        """
        sent = ffi.new("int[]", len(offers))
        pairs = [fd for client, backend, *_ in offers for fd in (client, backend)]
        lib.send_on_all(pairs, len(offers), sent)
        return ffi.unpack(sent, len(offers)) if offers else []

    def _begin(
        self, offer: Offer, sent: int, pair: tuple[int, int, int], joined: Joined
    ) -> "SockmapFlow | Exception":
        client, backend, number = pair
        result, cookies = joined
        if result < 0:
            self._free.append(number)
            reason = errno.errorcode.get(-result, "unknown").lower()
            return Refused(reason, prelude=_after(offer.prelude, sent))
        if result:
            # a verdict of the client's may run now, so its number is not free before it is closed
            leave = partial(self._left.append, (number, cookies))
            return Refused("backend_ended", leave, _after(offer.prelude, sent))
        passed = offer.prelude, sent
        try:
            flow = SockmapFlow(self, (client, backend), offer.over, (number, cookies), passed)
        except Exception as err:  # noqa: BLE001 - the pair's, whose sockets are closed this round
            self._left.append((number, cookies))
            return err
        self._flows[number] = flow
        return flow

    def _on_events(self, _: int) -> None:
        for direction in self.splice.events():
            flow = self._flows.get(direction >> 1)
            if flow is not None:
                flow.advance(Side(direction & 1))
        lost = self.splice.lost_events
        if lost != self._lost_events:
            self._lost_events = lost
            for flow in tuple(self._flows.values()):
                flow.advance(CLIENT)
                flow.advance(BACKEND)

    def leave(self, flow: "SockmapFlow") -> None:
        """
        Let go of *flow* at the end of the round, when its sockets are closed.
        """
        del self._flows[flow.number]
        self._left.append((flow.number, flow.cookies))

    def _leave(self) -> None:
        if not self._left:
            return
        self.splice.leave([cookie for _, cookies in self._left for cookie in cookies])
        # only now may the numbers, and with them the counts, be another connection's
        self._free.extend(number for number, _ in self._left)
        self._left.clear()


def _after(prelude: Prelude, sent: int) -> Prelude:
    """
    Add to *prelude* what was sent on by hand.
    """
    if not sent:
        return prelude
    return Prelude(prelude.taken + sent, prelude.given + sent, prelude.moved + sent)


class _Lag:
    """
    What a direction needs while its destination lags, which most never do.
    """

    __slots__ = ("pipe", "retry", "timer")

    def __init__(self) -> None:
        self.pipe: Any = ffi.NULL
        self.retry = FIRST_RETRY
        self.timer: Timer | None = None


class SockmapFlow(Flow):
    """
    One joined connection.
    """

    handoff = "sockmap"

    __slots__ = ("_before", "_handoff", "_joined", "_lags", "_moved", "cookies", "number")

    def __init__(
        self,
        handoff: SockmapHandoff,
        fds: tuple[int, int],
        over: Callable[[Flow], None],
        joined: tuple[int, tuple[int, int]],
        passed: tuple[Prelude, int],
    ) -> None:
        super().__init__(handoff.loop, fds, over)
        self._handoff = handoff
        self.number, self.cookies = joined
        self._joined = handoff.joined
        prelude, sent = passed
        self._moved = prelude.moved + sent
        # what came and went before; the backend was dialled: its first number went to the SYN
        self._before = ((prelude.taken + sent, _SYN + prelude.given + sent), (0, 0))
        self._lags: dict[Side, _Lag] = {}

    def on(self, side: Side, events: int) -> None:
        """
        Act on *events* of the socket of *side*.
        """
        if events & (select.EPOLLRDHUP | select.EPOLLHUP):
            self.run(self.session.ended(side))
        if events & select.EPOLLOUT and not self.session.over:
            self.advance(side.other)

    def drain(self, side: Side) -> None:
        """
        Say whether all that came from *side* is written, or begin to look for it.
        """
        if self._drained(side):
            self.run(self.session.drained(side))
        else:
            self.advance(side)

    def _drained(self, side: Side) -> bool:
        fds, direction = self.fds, 2 * self.number + side
        taken, given = self._before[side]
        return bool(lib.drained(fds[side], fds[1 - side], self._joined, direction, taken, given))

    def advance(self, side: Side) -> None:
        """
        Move what BPF passed of the bytes from *side*; see whether an ended side is drained.
        """
        session = self.session
        if session.over:
            return
        self._cancel_timer(side)
        status = self._move(side)
        if status != lib.MOVE_IDLE:
            self._wait(side, status)
        elif not session.waits_to_drain(side):
            self._relax(side)
        elif self._drained(side):
            self._relax(side)
            self.run(session.drained(side))
        else:
            self._wait(side, lib.MOVE_QUEUED)

    def _move(self, side: Side) -> int:
        """
        Move what user space has to, and tell why that stopped.
        """
        direction = 2 * self.number + side
        if not lib.is_slow(self._joined, direction):
            return int(lib.MOVE_IDLE)
        lag = self._lag(side)
        if lag.pipe == ffi.NULL:
            lag.pipe = lib.pipe_new()
        fds = self.fds[side], self.fds[side.other]
        _, given = self._before[side]
        return int(lib.slow_pump(lag.pipe, *fds, self._joined, direction, given, TURN))

    def _lag(self, side: Side) -> _Lag:
        lag = self._lags.get(side)
        if lag is None:
            lag = self._lags[side] = _Lag()
        return lag

    def _wait(self, side: Side, status: int) -> None:
        """
        Come back when what stopped the bytes from *side* may be over.
        """
        destination = self.fds[side.other]
        if status == lib.MOVE_MORE:
            self.loop.soon(partial(self.advance, side))
        elif status == lib.MOVE_FULL:
            self.loop.rearm(destination, ENDED | select.EPOLLOUT)
        elif status == lib.MOVE_QUEUED:
            # the kernel's worker tells nobody when it is done: look again, but only while the
            # destination is writable, for else there is nothing to see
            lag = self._lag(side)
            again = partial(self.loop.rearm, destination, ENDED | select.EPOLLOUT)
            lag.timer = self.loop.later(lag.retry, again)
            lag.retry = min(2 * lag.retry, LAST_RETRY)
        elif status == lib.MOVE_FAILED:
            self.failed(side, lib.socket_error(self.fds[side]))
        else:
            self.failed(side.other, lib.socket_error(destination))

    def _cancel_timer(self, side: Side) -> None:
        lag = self._lags.get(side)
        if lag is not None and lag.timer is not None:
            lag.timer.cancel()
            lag.timer = None

    def _relax(self, side: Side) -> None:
        lag = self._lags.get(side)
        if lag is None:
            return
        if lag.pipe != ffi.NULL:
            lib.pipe_free(lag.pipe)
            lag.pipe = ffi.NULL
            self.loop.rearm(self.fds[side.other], ENDED)
        lag.retry = FIRST_RETRY

    def bytes(self, side: Side) -> int:
        """
        Count what came from *side* and was moved on, by the kernel or by us.
        """
        moved = int(lib.moved(self._joined, 2 * self.number + side))
        return moved if side else moved + self._moved

    def release(self) -> None:
        """
        Free the pipes, and the connection's number once its sockets are closed.
        """
        for side, lag in self._lags.items():
            lib.pipe_free(lag.pipe)
            lag.pipe = ffi.NULL
            self._cancel_timer(side)
        self._handoff.leave(self)
