"""
The router's end of the control socket, in the router's own loop; the protocol is core.wire's.

Rules of this file:

1. Who may connect: root and the router's own user (SO_PEERCRED).
2. A table is checked whole, then one reference is swapped.  A message that is wrong is answered
   with a nack, or ends that peer's connection; the table stays.
"""

import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import structlog

from controller.core import wire
from controller.router.router import Router

READ_SIZE: Final = 1024 * 1024

MAX_PEERS: Final = 32
"""Control connections at once: one controller and a few people looking."""

NO_REPORT: Final[wire.Message] = {"engines": [], "problems": []}

log = structlog.get_logger()


class Control:
    """
    The listening end, and what the last controller reported.
    """

    def __init__(self, router: Router, path: Path, version: str) -> None:
        """
        Listen on *path*.

        Raises:
            OSError: that is not possible; the message names the path.
        """
        self._router = router
        self._path = path
        self._version = version
        self._peers: set[Peer] = set()
        self.report: wire.Message = NO_REPORT
        self._socket = _listen(path)
        router.loop.watch(self._socket.fileno(), select.EPOLLIN, self._on_peer)

    @property
    def controllers(self) -> int:
        """
        How many connected peers have pushed a table or a report.
        """
        return sum(peer.controller for peer in tuple(self._peers))

    def close(self) -> None:
        """
        Stop listening, and remove the socket's name.
        """
        for peer in tuple(self._peers):
            peer.close()
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _on_peer(self, _: int) -> None:
        try:
            connection, _address = self._socket.accept()
        except OSError as err:
            log.warning("control connection not accepted", error=str(err))
            return
        connection.setblocking(False)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _gid = struct.unpack("iII", credentials)
        if uid not in (0, os.geteuid()) or len(self._peers) >= MAX_PEERS:
            log.warning("control connection refused", pid=pid, uid=uid, peers=len(self._peers))
            connection.close()
            return
        self._peers.add(Peer(self, connection, self._router.loop))

    def gone(self, peer: "Peer") -> None:
        """
        Take note that *peer* has left.
        """
        self._peers.discard(peer)

    def answer(self, peer: "Peer", message: wire.Message) -> wire.Message | None:
        """
        Do what *message* asks, and return the answer to it.

        Raises:
            WireError: it asks nothing that there is.
        """
        kind = message["type"]
        if kind == "hello":
            return self._hello(message)
        if kind == "table":
            peer.controller = True
            return self._table(message)
        if kind == "report":
            peer.controller = True
            self.report = wire.read_report(message)
            return None
        if kind == "status":
            return {"type": "status", **self.status()}
        if kind == "routes":
            return {"type": "routes", "routes": wire.dump_routes(self._router.table.routes)}
        if kind == "drain":
            self._router.drain()
            return {"type": "drain"}
        raise wire.WireError(f"unknown message type {kind!r}")

    def _hello(self, message: wire.Message) -> wire.Message:
        if message.get("version") != wire.VERSION:
            raise wire.WireError(f"version {message.get('version')!r}, not {wire.VERSION}")
        return {"type": "hello", "version": wire.VERSION, **wire.dump_table(self._router.table)}

    def _table(self, message: wire.Message) -> wire.Message:
        router = self._router
        try:
            table = wire.read_table(message)
        except wire.WireError as err:
            router.stats.table_updates["nack"] += 1
            log.warning("table refused", error=str(err))
            generation = message.get("generation")
            return {"type": "nack", "generation": generation, "error": str(err)}
        router.replace_table(table)
        router.stats.table_updates["ack"] += 1
        log.info("table", generation=table.generation, routes=len(table.routes))
        return {"type": "ack", "generation": table.generation}

    def status(self) -> dict[str, Any]:
        """
        Tell how the router is.
        """
        router = self._router
        total = sum(router.stats.connections.values())
        return {
            "version": self._version,
            "ready": router.table.generation > 0 and not router.draining,
            "draining": router.draining,
            "generation": router.table.generation,
            "routes": len(router.table.routes),
            "table_age": (
                round(time.monotonic() - router.table_since, 3) if router.table.generation else None
            ),
            "handoff": {"chosen": router.ladder[0].name, "reason": router.ladder_reason},
            "client_ip": {
                "mode": router.settings.client_ip,
                "working": router.transparency.working,
                "reason": router.transparency.reason,
            },
            "connections": {
                "active": len(router.connections),
                "total": total,
                "max": router.max_connections,
            },
            "controllers": self.controllers,
            "engines": self.report["engines"],
            "problems": self.report["problems"],
        }


class Peer:
    """
    One connection to the control socket.
    """

    def __init__(self, control: Control, connection: socket.socket, loop: Any) -> None:
        self.controller = False
        self._control = control
        self._socket = connection
        self._loop = loop
        self._decoder = wire.Decoder()
        self._messages: Iterator[wire.Message] = iter(())
        self._out = bytearray()
        loop.watch(connection.fileno(), select.EPOLLIN, self._on)

    def _on(self, events: int) -> None:
        try:
            if events & ~select.EPOLLOUT:
                self._read()
            self._answer()
        except (OSError, EOFError):
            self.close()
        except (wire.WireError, RecursionError) as err:
            log.warning("control message refused", error=str(err))
            self.close()

    def _read(self) -> None:
        data = self._socket.recv(READ_SIZE)
        if not data:
            raise EOFError
        self._messages = self._decoder.feed(data)

    def _answer(self) -> None:
        """
        Answer what was asked, one after the other.

        A peer that does not read an answer has its next question wait, read or not: else a few
        bytes of questions would make any number of tables to keep.
        """
        self._flush()
        while not self._out and (message := next(self._messages, None)) is not None:
            answer = self._control.answer(self, message)
            if answer is not None:
                self._out += wire.encode(answer)
                self._flush()
        self._loop.rearm(self._socket.fileno(), select.EPOLLOUT if self._out else select.EPOLLIN)

    def _flush(self) -> None:
        try:
            while self._out:
                del self._out[: self._socket.send(self._out)]
        except BlockingIOError:
            pass

    def close(self) -> None:
        """
        Let the peer go.
        """
        self._control.gone(self)
        self._loop.close(self._socket.detach())


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        # a name that a killed router left behind; one that still listens keeps it
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise OSError(None, "another router listens here")  # noqa: TRY301
            path.unlink()
        old = os.umask(0o117)
        try:
            listener.bind(str(path))
        finally:
            os.umask(old)
        listener.listen(16)
        listener.setblocking(False)
    except OSError as err:
        listener.close()
        raise OSError(err.errno, f"control socket {path}: {err.strerror or err}") from None
    return listener
