"""
The `relay` hand-off: user space moves the bytes.  It needs nothing, and is always there.

Bounded by one chunk each way, and that only while the destination takes no more: then nothing is
read from the source, whose window closes.
"""

import select
from collections.abc import Callable
from functools import partial
from typing import Final

from controller.core.session import Side
from controller.router._native import ffi, lib
from controller.router.flow import Flow, Handoff, Offer, Prelude
from controller.router.loop import Loop

MOVES: Final = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
"""Edge-triggered, so that a side that has to wait costs nothing."""

TURN: Final = 4 * 1024 * 1024
"""Bytes that one direction may move before others have their turn."""


class RelayHandoff(Handoff):
    """
    The rung.
    """

    name = "relay"

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def take(self, offer: Offer) -> Flow:
        """
        Move the bytes of the two sockets.
        """
        client, backend, over, prelude = offer
        flow = RelayFlow(self._loop, (client, backend), over, prelude)
        flow.start()
        return flow


class RelayFlow(Flow):
    """
    One relayed connection.
    """

    handoff = "relay"

    __slots__ = ("_moved", "_pipes")

    def __init__(
        self, loop: Loop, fds: tuple[int, int], over: Callable[[Flow], None], prelude: Prelude
    ) -> None:
        super().__init__(loop, fds, over)
        self._pipes = [lib.pipe_new(), lib.pipe_new()]
        self._moved = ffi.new("uint64_t[2]", [prelude.moved, 0])

    def start(self) -> None:
        """
        Listen to both sockets; what they have queued is an event already.
        """
        self.watch(self.loop, [self], MOVES)

    def on(self, side: Side, events: int) -> None:
        """
        Act on *events* of the socket of *side*.
        """
        if events & (select.EPOLLIN | select.EPOLLRDHUP):
            self._pump(side)
        if events & select.EPOLLOUT:
            self._pump(side.other)

    def _pump(self, side: Side) -> None:
        if self.session.over or self._pipes[side] == ffi.NULL:
            return
        source, destination = self.fds[side], self.fds[side.other]
        status = lib.relay_pump(self._pipes[side], source, destination, TURN, self._moved + side)
        if status == lib.MOVE_MORE:
            self.loop.soon(partial(self._pump, side))
        elif status == lib.MOVE_END:
            self.run(self.session.ended(side))
        elif status == lib.MOVE_FAILED:
            self.failed(side, lib.socket_error(source))
        elif status == lib.MOVE_BROKEN:
            self.failed(side.other, lib.socket_error(destination))

    def drain(self, side: Side) -> None:
        """
        The end is read only when all before it is written.
        """
        lib.pipe_free(self._pipes[side])
        self._pipes[side] = ffi.NULL
        self.run(self.session.drained(side))

    def bytes(self, side: Side) -> int:
        """
        Count what came from *side* and was written to the other.
        """
        return int(self._moved[side])

    def release(self) -> None:
        """
        Free the pipes.
        """
        for side in Side:
            lib.pipe_free(self._pipes[side])
            self._pipes[side] = ffi.NULL
