"""
The router whose place this one takes, as this one sees it; the protocol is core.wire's.

The order that spares every client a refusal:

1. `find`: its table is taken, so this router is ready before its first client.
2. This router's sockets listen beside the old ones, on the same addresses.
3. `switch`: the kernel gives all new clients to them, and the old router is told.  It goes on
   accepting those that are half-way, and closes its sockets when none can be.
4. The kernel chooses among this router's sockets as it likes.
"""

import contextlib
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import structlog

from controller import privilege
from controller.core import wire
from controller.core.routes import RouteTable
from controller.router.listen import name, steer, steer_no_more

ANSWER_TIMEOUT: Final = 10.0
"""Seconds that the old router may take to answer; it does in milliseconds, with a large table in
seconds."""

READ_SIZE: Final = 1024 * 1024

log = structlog.get_logger()


class Predecessor:
    """
    The old router.

    It serves *table*, has so many *sockets* for each address, and is the *owner* of its flows; the
    packet hand-off *is_off* there if somebody has switched it off.
    """

    def __init__(self, connection: socket.socket) -> None:
        """
        Announce that this router takes its place.

        Raises:
            WireError: it does not agree; the message is its reason.
            OSError: it does not answer.
        """
        self._socket = connection
        self._decoder = wire.Decoder()
        self._socket.settimeout(ANSWER_TIMEOUT)
        answer = self._ask({"type": "replace"})
        self.sockets, self.owner, self.is_off = wire.read_listening(answer)
        self.table: RouteTable = wire.read_hello(
            self._ask({"type": "hello", "version": wire.VERSION})
        )

    def forget(self) -> None:
        """
        Leave it to another process, which this one was forked off.
        """
        self._socket.close()

    def switch(
        self,
        listeners: Sequence[socket.socket],
        plumbing: bool,  # noqa: FBT001 - this router's stands, in the place of the old one's
    ) -> None:
        """
        Have all new clients come to *listeners*, which listen.
        """
        groups: dict[str, list[socket.socket]] = {}
        for listener in listeners:
            groups.setdefault(name(listener), []).append(listener)
        shared = [group for address, group in groups.items() if self.sockets.get(address)]
        for group in shared:
            steer(group[0], self.sockets[name(group[0])], len(group))
        log.info("new clients switched", addresses=[name(group[0]) for group in shared])

        def see_off() -> None:
            # capabilities are a thread's
            privilege.drop_to(())
            self._hear_it_close(plumbing)
            for group in shared:
                # this router may be at its own end by now
                with contextlib.suppress(OSError):
                    steer_no_more(group[0])
            # whatever else it has to say
            with contextlib.suppress(OSError):
                while self._socket.recv(READ_SIZE):
                    pass
            self._socket.close()

        threading.Thread(target=see_off, name="predecessor", daemon=True).start()

    def _hear_it_close(self, plumbing: bool) -> None:  # noqa: FBT001 - as above
        try:
            self._socket.settimeout(None)
            self._ask({"type": "switched", "plumbing": plumbing})
            log.info("old router listens no more")
        except (OSError, wire.WireError) as err:
            # it has ended, which closes its sockets too
            log.warning("old router lost", error=str(err))

    def _ask(self, message: wire.Message) -> wire.Message:
        self._socket.sendall(wire.encode(message))
        while data := self._socket.recv(READ_SIZE):
            for answer in self._decoder.feed(data):
                return answer
        raise wire.WireError("it hung up; is this user allowed to ask?")


def find(path: Path) -> Predecessor | None:
    """
    Find the router that has the control socket *path*; None if there is none.

    Raises:
        WireError: there is one, whose place can not be taken.
        OSError: it does not answer.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(path))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        return None
    return Predecessor(connection)
