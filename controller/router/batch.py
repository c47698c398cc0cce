"""
From the hello to the hand-off, for many connections together.

Each step is made for all of them before the next one begins: code that has just run is in the
processor's caches, and half of the time that a connection takes is else spent waiting for it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from controller.router._native import ffi, lib
from controller.router.flow import Flow
from controller.router.ports import find_range

if TYPE_CHECKING:
    from controller.router.connection import Connection
    from controller.router.router import Router

TOGETHER: Final = 64
"""Connections that make a step before the first of them makes the next."""

KEEPALIVE_IDLE: Final = 300
"""Seconds of silence before TCP asks whether the other end lives; below the idle limits of common
stateful firewalls."""

_SIZE: Final = ffi.sizeof("struct dial")


class Batch:
    """
    The connections that are to dial, and those that are connected and to be handed over.
    """

    def __init__(self, router: "Router") -> None:
        self._router = router
        self._loop = loop = router.loop
        self._to_dial: list[Connection] = []
        self._connected: list[Connection] = []
        self._is_due = False
        self._dials: Any = ffi.new("struct dial[]", TOGETHER)
        self._buffer = ffi.buffer(self._dials)
        self._dialler: Any = ffi.new(
            "struct dialler *",
            {
                "receive_buffer": router.settings.receive_buffer,
                "keepalive_idle": KEEPALIVE_IDLE,
                "epoll": loop.epoll_fd,
                "ports_are_kernels": not find_range()[1],
            },
        )

    def dial(self, connection: "Connection") -> None:
        """
        Have *connection* dial its backend, before the loop waits again.
        """
        self._wait_for(self._to_dial, connection)

    def hand_over(self, connection: "Connection") -> None:
        """
        Have *connection*, whose backend has accepted, handed over, by the same time.
        """
        self._wait_for(self._connected, connection)

    def _wait_for(self, step: "list[Connection]", connection: "Connection") -> None:
        step.append(connection)
        if not self._is_due:
            self._is_due = True
            self._loop.soon(self.flush)

    def flush(self) -> None:
        """
        Make all steps that are due, and those that come of them.
        """
        # what comes of a step is made here as well
        self._is_due = True
        try:
            while self._to_dial or self._connected:
                self._dial_all(_take_from(self._to_dial))
                self._hand_over_all(_take_from(self._connected))
        finally:
            self._is_due = False

    def _dial_all(self, connections: "list[Connection]") -> None:
        guard = self._loop.guard
        dialling: list[Connection] = []
        for connection in connections:
            if guard(connection.write_dial, self._buffer, len(dialling) * _SIZE):
                dialling.append(connection)
        lib.dial_all(self._dialler, self._dials, len(dialling))
        outcomes = [(dial.fd, dial.connected) for dial in self._dials[0 : len(dialling)]]
        for connection, (fd, connected) in zip(dialling, outcomes, strict=True):
            guard(connection.on_dialled, fd, connected)

    def _hand_over_all(self, connections: "list[Connection]") -> None:
        """
        Offer each to one rung of the ladder after the other, of which the last refuses nothing.
        """
        guard = self._loop.guard
        for connection in connections:
            guard(connection.make_offer)
        for handoff in self._router.ladder:
            offers = [
                (connection, connection.offer)
                for connection in connections
                if connection.offer is not None and connection.may_have(handoff)
            ]
            if not offers:
                continue
            taken: Sequence[Flow | Exception]
            try:
                taken = handoff.take_all([offer for _, offer in offers])
            except Exception as err:  # noqa: BLE001 - before any was taken: all are cut
                taken = [err] * len(offers)
            for (connection, _), one in zip(offers, taken, strict=True):
                guard(connection.on_taken, handoff, one)


def _take_from(step: "list[Connection]") -> "list[Connection]":
    some = step[:TOGETHER]
    del step[:TOGETHER]
    # who was cut meanwhile has a result
    return [connection for connection in some if not connection.result]
