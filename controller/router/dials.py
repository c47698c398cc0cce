"""
Dialling backends, together: what is done for one after the other is done with warm caches.
"""

from typing import TYPE_CHECKING, Any, Final

from controller.router._native import ffi, lib
from controller.router.loop import Loop
from controller.router.ports import find_range

if TYPE_CHECKING:
    from controller.router.connection import Connection

TOGETHER: Final = 64
"""Backends that are dialled before the first of them is handed over."""

KEEPALIVE_IDLE: Final = 300
"""Seconds of silence before TCP asks whether the other end lives; below the idle limits of common
stateful firewalls."""

_SIZE: Final = ffi.sizeof("struct dial")


class Dials:
    """
    The connections that are to be dialled.
    """

    def __init__(self, loop: Loop, receive_buffer: int) -> None:
        self._loop = loop
        self._due: list[Connection] = []
        self._dials: Any = ffi.new("struct dial[]", TOGETHER)
        self._buffer = ffi.buffer(self._dials)
        self._dialler: Any = ffi.new(
            "struct dialler *",
            {
                "receive_buffer": receive_buffer,
                "keepalive_idle": KEEPALIVE_IDLE,
                "epoll": loop.epoll_fd,
                "ports_are_kernels": not find_range()[1],
            },
        )

    def add(self, connection: "Connection") -> None:
        """
        Have *connection* dial its backend with the next `flush`, at the end of the round at latest.
        """
        if not self._due:
            self._loop.soon(self.flush)
        self._due.append(connection)

    def flush(self) -> None:
        """
        Dial, and have each connection hear of it.
        """
        while self._due:
            # who was cut meanwhile has a result
            due = [connection for connection in self._due if not connection.result]
            due, self._due = due[:TOGETHER], due[TOGETHER:]
            for at, connection in enumerate(due):
                connection.write_dial(self._buffer, at * _SIZE)
            lib.dial_all(self._dialler, self._dials, len(due))
            outcomes = [(dial.fd, dial.connected) for dial in self._dials[0 : len(due)]]
            for connection, (fd, connected) in zip(due, outcomes, strict=True):
                self._loop.guard(connection.on_dialled, fd, connected)
