"""
The `sockmap` hand-off: the kernel moves the bytes, within a bound.

A direction is fast while BPF redirects all of it.  When its destination lags by more than the
limit, BPF passes segments to user space and says so once; `advance` then moves them, in order
behind what the kernel still holds, until it has caught up and BPF redirects again.
"""

import errno
import select
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from bpfprog import MAX_CONNECTIONS, Splice
from controller.core.session import Side
from controller.router._native import ffi, lib
from controller.router.flow import (
    ENDED,
    FIRST_RETRY,
    LAST_RETRY,
    UNTOUCHED,
    Flow,
    Prelude,
    Refused,
)
from controller.router.loop import Loop, Timer

_SYN: Final = 1

TURN: Final = 4 * 1024 * 1024
"""Bytes that one slow direction may move before others have their turn."""


class SockmapHandoff:
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
        loop.round_ends.append(self._leave)
        loop.watch(splice.events_fd, select.EPOLLIN, self._on_events)

    def take(
        self,
        client: int,
        backend: int,
        over: Callable[[Flow], None],
        prelude: Prelude = UNTOUCHED,
    ) -> Flow:
        """
        Join the two sockets.

        Raises:
            Refused: the kernel does not take one of them, or every number is in use.
        """
        if not self._free:
            raise Refused("full")
        # BPF would forward the whole of a segment that was read in part
        if prelude.pending or not prelude.drained:
            raise Refused("not_drained")
        number = self._free.pop()
        try:
            joined, cookies = self.splice.join(client, backend, number, self._limit)
        except OSError as err:
            self._free.append(number)
            raise Refused(errno.errorcode.get(err.errno or 0, "unknown").lower()) from None
        if not joined:
            # a verdict of the client's may run now, so its number is not free before it is closed
            raise Refused("backend_ended", partial(self._left.append, (number, cookies)))
        flow = SockmapFlow(self, (client, backend), over, (number, cookies), prelude)
        self._flows[number] = flow
        flow.start()
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
                flow.advance(Side.CLIENT)
                flow.advance(Side.BACKEND)

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


class SockmapFlow(Flow):
    """
    One joined connection.
    """

    handoff = "sockmap"

    __slots__ = (
        "_handoff",
        "_pipes",
        "_prelude",
        "_retry",
        "_timers",
        "_views",
        "cookies",
        "number",
    )

    def __init__(
        self,
        handoff: SockmapHandoff,
        fds: tuple[int, int],
        over: Callable[[Flow], None],
        joined: tuple[int, tuple[int, int]],
        prelude: Prelude,
    ) -> None:
        super().__init__(handoff.loop, fds, over)
        self._handoff = handoff
        self.number, self.cookies = joined
        self._prelude = prelude
        self._views: list[Any] = [None, None]
        self._pipes = [ffi.NULL, ffi.NULL]
        self._timers: list[Timer | None] = [None, None]
        self._retry = [FIRST_RETRY, FIRST_RETRY]

    def start(self) -> None:
        """
        Listen for the ends, then have the kernel look at what is queued: the hello goes first.
        """
        self.watch(ENDED)

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
        Begin to look whether all that came from *side* is written.
        """
        self.advance(side)

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
        elif lib.drained(self.fds[side], self.fds[side.other], self._view(side)):
            self._relax(side)
            self.run(session.drained(side))
        else:
            self._wait(side, lib.MOVE_QUEUED)

    def _move(self, side: Side) -> int:
        """
        Move what user space has to, and tell why that stopped.
        """
        counts = self._view(side)
        if not lib.is_slow(counts):
            return int(lib.MOVE_IDLE)
        if self._pipes[side] == ffi.NULL:
            self._pipes[side] = lib.pipe_new()
        fds = self.fds[side], self.fds[side.other]
        return int(lib.slow_pump(self._pipes[side], *fds, counts, TURN))

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
            delay = self._retry[side]
            self._retry[side] = min(2 * delay, LAST_RETRY)
            again = partial(self.loop.rearm, destination, ENDED | select.EPOLLOUT)
            self._timers[side] = self.loop.later(delay, again)
        elif status == lib.MOVE_FAILED:
            self.failed(side, lib.socket_error(self.fds[side]))
        else:
            self.failed(side.other, lib.socket_error(destination))

    def _cancel_timer(self, side: Side) -> None:
        timer = self._timers[side]
        if timer is not None:
            timer.cancel()
            self._timers[side] = None

    def _view(self, side: Side) -> Any:
        """
        Where native code finds the counts of *side*; most connections need it at their end only.
        """
        view = self._views[side]
        if view is None:
            counts, consumed = self._handoff.splice.addresses(2 * self.number + side)
            taken, given = self._prelude.taken, self._prelude.given
            # the backend was dialled: its first sequence number went to the SYN
            before = (taken, _SYN + given) if side == Side.CLIENT else (0, 0)
            view = self._views[side] = ffi.new(
                "struct direction_counts *",
                (ffi.cast("struct counts *", counts), ffi.cast("uint64_t *", consumed), *before),
            )
        return view

    def _relax(self, side: Side) -> None:
        if self._pipes[side] != ffi.NULL:
            lib.pipe_free(self._pipes[side])
            self._pipes[side] = ffi.NULL
            self.loop.rearm(self.fds[side.other], ENDED)
        self._retry[side] = FIRST_RETRY

    def bytes(self, side: Side) -> int:
        """
        Count what came from *side* and was moved on, by the kernel or by us.
        """
        redirected, _, consumed = self._handoff.splice.counts(2 * self.number + side)
        return redirected + consumed + (self._prelude.moved if side == Side.CLIENT else 0)

    def release(self) -> None:
        """
        Free the pipes, and the connection's number once its sockets are closed.
        """
        for side in Side:
            lib.pipe_free(self._pipes[side])
            self._pipes[side] = ffi.NULL
            self._cancel_timer(side)
        self._handoff.leave(self)
