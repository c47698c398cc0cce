"""
The router's end of the control socket; the protocol is core.wire's.

Rules of this file:

1. Who may connect: root and the router's own user (SO_PEERCRED).
2. A table is checked whole, then one reference is swapped.  A message that is wrong is answered
   with a nack, or ends that peer's connection; the table stays.
3. Each peer has a thread, where its messages are read and its answers written: a large table takes
   seconds.  What they change is changed in the loop.
"""

import contextlib
import os
import socket
import struct
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog

from controller import privilege
from controller.core import wire
from controller.core.routes import RouteTable
from controller.router.router import ACCEPT_PAUSE, Router

READ_SIZE: Final = 1024 * 1024

MAX_PEERS: Final = 32
"""Control connections at once: one controller and a few people looking."""

LAST_ANSWERS: Final = 1.0
"""Seconds that the end of the router waits for answers under way, as that to a `drain`."""

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
        self.loop = router.loop
        self._path = path
        self._version = version
        self._peers: set[Peer] = set()
        self._one_table = threading.Lock()
        self._closed = False
        self.report: wire.Message = NO_REPORT
        self._socket = _listen(path)
        threading.Thread(target=self._accept, name="control", daemon=True).start()

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
        self._closed = True
        # the one wakes who waits in accept, the other does not
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._path.unlink(missing_ok=True)
        until = time.monotonic() + LAST_ANSWERS
        for peer in tuple(self._peers):
            peer.leave(until)

    def _accept(self) -> None:
        # capabilities are a thread's, and this one passes its own on to its peers' threads
        privilege.drop_to(())
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
                self._welcome(connection)
            except (OSError, RuntimeError) as err:
                if not self._closed:
                    log.warning("control connection not accepted", error=str(err))
                    # whoever waits goes on waiting: without a pause this would spin
                    time.sleep(ACCEPT_PAUSE)

    def _welcome(self, connection: socket.socket) -> None:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _gid = struct.unpack("iII", credentials)
        if uid not in (0, os.geteuid()) or len(self._peers) >= MAX_PEERS:
            log.warning("control connection refused", pid=pid, uid=uid, peers=len(self._peers))
            connection.close()
            return
        peer = Peer(self, connection)
        self._peers.add(peer)
        try:
            peer.start()
        except RuntimeError:
            # no thread to be had
            self.gone(peer)
            raise

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
        if kind in ("hello", "table"):
            # whoever says hello hears of a table that is on its way, and comes after it
            with self._one_table:
                if kind == "hello":
                    return self._hello(message)
                peer.controller = True
                return self._table(message)
        if kind == "report":
            peer.controller = True
            self.report = wire.read_report(message)
            return None
        if kind == "status":
            return {"type": "status", **self.loop.ask(self.status)}
        if kind == "routes":
            return {"type": "routes", "routes": wire.dump_routes(self._router.table.routes)}
        if kind == "drain":
            self.loop.ask(self._router.drain)
            return {"type": "drain"}
        raise wire.WireError(f"unknown message type {kind!r}")

    def _hello(self, message: wire.Message) -> wire.Message:
        if message.get("version") != wire.VERSION:
            raise wire.WireError(f"version {message.get('version')!r}, not {wire.VERSION}")
        return {"type": "hello", "version": wire.VERSION, **wire.dump_table(self._router.table)}

    def _table(self, message: wire.Message) -> wire.Message:
        try:
            table = wire.read_table(message)
        except wire.WireError as err:
            self.loop.ask(partial(self._refuse, str(err)))
            generation = message.get("generation")
            return {"type": "nack", "generation": generation, "error": str(err)}
        self.loop.ask(partial(self._take, table))
        return {"type": "ack", "generation": table.generation}

    def _refuse(self, error: str) -> None:
        self._router.stats.table_updates["nack"] += 1
        log.warning("table refused", error=error)

    def _take(self, table: RouteTable) -> None:
        self._router.replace_table(table)
        self._router.stats.table_updates["ack"] += 1
        log.info("table", generation=table.generation, routes=len(table.routes))

    def status(self) -> dict[str, Any]:
        """
        Tell how the router is; to be called in its loop.
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

    def __init__(self, control: Control, connection: socket.socket) -> None:
        self.controller = False
        self._control = control
        self._socket = connection
        self._thread = threading.Thread(target=self._run, name="control peer", daemon=True)

    def start(self) -> None:
        """
        Answer what is asked, one after the other.

        A peer that does not read an answer has its next question wait, read or not: else a few
        bytes of questions would make any number of tables to keep.
        """
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._socket:
                self._converse()
        except (wire.WireError, RecursionError) as err:
            log.warning("control message refused", error=str(err))
        except OSError:
            pass
        except Exception as err:  # noqa: BLE001 - the root of the thread
            self._control.loop.fault(self._run, err)
        finally:
            self._control.gone(self)

    def _converse(self) -> None:
        decoder = wire.Decoder()
        while data := self._socket.recv(READ_SIZE):
            for message in decoder.feed(data):
                answer = self._control.answer(self, message)
                if answer is not None:
                    self._socket.sendall(wire.encode(answer))

    def leave(self, until: float) -> None:
        """
        Take no more questions, and wait for the answer under way, but not beyond *until*.
        """
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)
        self._thread.join(max(0.0, until - time.monotonic()))


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
    except OSError as err:
        listener.close()
        raise OSError(err.errno, f"control socket {path}: {err.strerror or err}") from None
    return listener
