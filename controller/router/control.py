"""
The router's end of the control socket; the protocol is core.wire's.

Rules of this file:

1. Who may connect: root and the router's own user (SO_PEERCRED).
2. A table is checked whole, then one reference is swapped.  A message that is wrong is answered
   with a nack, or ends that peer's connection; the table stays.
3. The name of the socket goes with the place: a router that replaces another takes it over, and one
   removes it at its end only if it still is its own.
4. Where there are several workers, this is worker 0's, which speaks for all: what concerns them is
   passed on, and what they answer is added up.
5. Each peer has a thread, where its messages are read and its answers written: a large table takes
   seconds.  What they change is changed in the loop.
"""

import contextlib
import os
import socket
import struct
import threading
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from http.server import ThreadingHTTPServer
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from controller import privilege
from controller.core import wire
from controller.core.routes import RouteTable
from controller.core.session import BACKEND, CLIENT
from controller.router.connection import Connection
from controller.router.listen import name
from controller.router.numbers import Numbers, read_numbers
from controller.router.router import ACCEPT_PAUSE, Router
from controller.settings import RUN

if TYPE_CHECKING:
    from controller.router.workers import Workers

READ_SIZE: Final = 1024 * 1024

MAX_PEERS: Final = 32
"""Control connections at once: one controller and a few people looking."""

LAST_ANSWERS: Final = 1.0
"""Seconds that the end of the router waits for answers under way, as that to a `drain`."""

HANDSHAKE: Final = 3.0
"""Seconds at least that a replaced router goes on accepting: a client is accepted when its hello
comes or a second has passed, and a lost SYN-ACK is sent again after one second, and two more."""

HANDFUL: Final = 100
"""Connections told or killed at once, so that those under way have their turn."""

NO_REPORT: Final[wire.Message] = {"engines": [], "problems": []}

log = structlog.get_logger()


class Control:
    """
    The listening end, and what the last controller reported.
    """

    def __init__(
        self,
        router: Router,
        listener: socket.socket | None,
        path: Path,
        version: str,
        *,
        replacing: bool = False,
    ) -> None:
        """
        Serve *listener*, if any, which `listen` made for *path*.

        If this router is *replacing* another, it is beside that one's until `take_over`.
        """
        self._router = router
        self.loop = router.loop
        self._path = path
        self._version = version
        self._peers: set[Peer] = set()
        self.one_table = threading.Lock()
        self._closed = listener is None
        self._answers: dict[str, Callable[[Peer, wire.Message], wire.Message | None]] = {
            "hello": self._hello,
            "table": self._table,
            "report": self._report,
            "status": self._status,
            "routes": self._routes,
            "drain": self._drain,
            "connections": self._connections,
            "kill": self._kill,
            "packet": self._packet,
            "replace": self._replace,
            "switched": self._switched,
        }
        self.report: wire.Message = NO_REPORT
        self.replacing = replacing
        self.metrics: ThreadingHTTPServer | None = None
        self.workers: Workers | None = None
        self._successor: Peer | None = None
        if listener is not None:
            self._socket = listener
            self._name = Path(listener.getsockname())
            self._inode = self._name.stat().st_ino
            threading.Thread(target=self._accept, name="control", daemon=True).start()

    @property
    def controllers(self) -> int:
        """
        How many connected peers have pushed a table or a report.
        """
        return sum(peer.controller for peer in tuple(self._peers))

    def take_over(self) -> None:
        """
        Take the control socket's name from the router that is replaced.
        """
        self._name = self._name.replace(self._path)

    def close(self) -> None:
        """
        Stop listening, and remove the socket's name.
        """
        if not self._closed:
            self._stop_listening()
            with contextlib.suppress(FileNotFoundError):
                # it may be another router's by now
                if self._name.stat().st_ino == self._inode:
                    self._name.unlink()
        until = time.monotonic() + LAST_ANSWERS
        for peer in tuple(self._peers):
            peer.leave(until)

    def _stop_listening(self) -> None:
        self._closed = True
        # the one wakes who waits in accept, the other does not
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

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
        if self._successor is peer:
            self._successor = None

    def answer(self, peer: "Peer", message: wire.Message) -> wire.Message | None:
        """
        Do what *message* asks, and return the answer to it.

        Raises:
            WireError: it asks nothing that there is.
        """
        answer = self._answers.get(message["type"])
        if answer is None:
            raise wire.WireError(f"unknown message type {message['type']!r}")
        return answer(peer, message)

    def _hello(self, _: "Peer", message: wire.Message) -> wire.Message:
        if message.get("version") != wire.VERSION:
            raise wire.WireError(f"version {message.get('version')!r}, not {wire.VERSION}")
        # whoever says hello hears of a table that is on its way, and comes after it
        with self.one_table:
            return {
                "type": "hello",
                "version": wire.VERSION,
                "run": os.environ.get(RUN, ""),
                **wire.dump_table(self._router.table),
            }

    def _table(self, peer: "Peer", message: wire.Message) -> wire.Message:
        peer.controller = True
        with self.one_table:
            try:
                table = wire.read_table(message)
            except wire.WireError as err:
                self.loop.ask(partial(self._refuse, str(err)))
                generation = message.get("generation")
                return {"type": "nack", "generation": generation, "error": str(err)}
            self.loop.ask(partial(self._take, table))
            for answer in self._ask_workers(message):
                if answer["type"] != "ack":
                    log.error("table refused by a worker", error=answer.get("error"))
        return {"type": "ack", "generation": table.generation}

    def _report(self, peer: "Peer", message: wire.Message) -> None:
        peer.controller = True
        self.report = wire.read_report(message)

    def _status(self, *_: object) -> wire.Message:
        status, numbers = self.loop.ask(self.status), self.numbers()
        active = numbers.counts["active"].total() + numbers.counts["pending"].total()
        status["connections"] = {
            "active": active,
            "total": numbers.counts["connections"].total(),
            "max": numbers.counts["max_connections"].total(),
        }
        return {"type": "status", **status}

    def _routes(self, *_: object) -> wire.Message:
        return {"type": "routes", "routes": wire.dump_routes(self._router.table.routes)}

    def _drain(self, *_: object) -> wire.Message:
        self.loop.ask(self._router.drain)
        return {"type": "drain"}

    def _connections(self, _: "Peer", message: wire.Message) -> wire.Message:
        after = wire.read_connections(message)
        ids = self.loop.ask(lambda: list(self._router.connections))
        first = bisect_right(ids, after)
        page = ids[first : first + wire.PAGE]
        rows = [row for ids in _handfuls(page) for row in self.loop.ask(partial(self._tell, ids))]
        more = first + wire.PAGE < len(ids)
        for answer in self._ask_workers(message):
            rows += answer["connections"]
            more = more or answer["more"]
        rows.sort(key=itemgetter("id"))
        more = more or len(rows) > wire.PAGE
        return {"type": "connections", "connections": rows[: wire.PAGE], "more": more}

    def _tell(self, ids: Iterable[int]) -> list[wire.Message]:
        under_way = self._router.connections
        return [_tell_connection(under_way[i]) for i in ids if i in under_way]

    def _kill(self, _: "Peer", message: wire.Message) -> wire.Message:
        handfuls = _handfuls(wire.read_kill(message))
        killed = [i for ids in handfuls for i in self.loop.ask(partial(self._router.kill, ids))]
        for answer in self._ask_workers(message):
            killed += answer["killed"]
        log.info("killed", connections=len(killed))
        return {"type": "kill", "killed": killed}

    def _packet(self, _: "Peer", message: wire.Message) -> wire.Message:
        state = wire.read_packet(message)
        # worker 0, when it is off and alone, takes down what the others may be about to use
        last = state == wire.PacketState.OFF
        answers = self._ask_workers(message) if last else []
        try:
            packet = self.loop.ask(partial(self._switch_packet, state))
        except ValueError as err:
            return {"type": "packet", "error": str(err)}
        for answer in answers if last else self._ask_workers(message):
            packet["flows"] += answer.get("packet", {"flows": 0})["flows"]
        return {"type": "packet", "packet": packet}

    def _switch_packet(self, state: wire.PacketState) -> dict[str, Any]:
        packet = self._router.packet
        if packet is None:
            reason = self._router.packet_reason
            raise ValueError(f"the packet hand-off is not in use here: {reason}")
        if state != wire.PacketState.STATUS:
            (packet.on if state == wire.PacketState.ON else packet.off)()
            log.info("packet hand-off", state=state)
        return packet.status()

    def _refuse(self, error: str) -> None:
        self._router.stats.table_updates["nack"] += 1
        log.warning("table refused", error=error)

    def _take(self, table: RouteTable) -> None:
        self._router.replace_table(table)
        self._router.stats.table_updates["ack"] += 1
        # one line for all workers
        say = log.debug if self._router.worker else log.info
        say("table", generation=table.generation, routes=len(table.routes))

    def _replace(self, peer: "Peer", _: wire.Message) -> wire.Message:
        """
        Let the router at *peer* take this one's place.
        """
        if self._successor not in (None, peer) or self.replacing:
            # the order of sockets that either counts on would not hold
            busy = "takes another's place" if self.replacing else "is being replaced"
            return {"type": "nack", "error": f"it {busy} right now: try again when that has ended"}
        self._successor = peer
        packet = self._router.packet
        listeners = [*self._router.held, *([self.metrics.socket] if self.metrics else [])]
        return {
            "type": "listening",
            "sockets": Counter(map(name, listeners)),
            "owner": self._router.owner,
            "packet_off": packet is not None and packet.is_switched_off,
        }

    def _switched(self, peer: "Peer", message: wire.Message) -> wire.Message:
        """
        Leave all that is new to the successor, and drain; answer when nothing listens any more.
        """
        plumbing = wire.read_switched(message)
        if self._successor is not peer:
            raise wire.WireError("switched without replace")
        log.info("replaced")
        self._stop_listening()
        # a controller finds the new router under the old name
        for other in self._peers - {peer}:
            other.leave(0)
        if plumbing:
            self._router.transparency.leave()
            self._ask_workers({"type": "leave"})
        if self._router.devices is not None:
            self._router.devices.stop()
        linger = max(self._router.settings.hello_timeout, HANDSHAKE)
        self.loop.ask(partial(self._router.drain, linger))
        self._router.closed.wait()
        if self.metrics is not None:
            self.metrics.shutdown()
            self.metrics.server_close()
        return {"type": "closed"}

    @property
    def running_workers(self) -> int:
        """
        How many workers run beside this one.
        """
        return self.workers.running if self.workers is not None else 0

    def _ask_workers(self, message: wire.Message) -> list[wire.Message]:
        return self.workers.ask(message) if self.workers is not None else []

    def settle(self, half: int) -> None:
        """
        Take over, with all workers, the flows of the routers that had the other *half* of owners.

        They have ended.
        """
        self._ask_workers({"type": "adopt", "half": half})
        self.loop.ask(partial(self._router.adopt_rest, half))
        # its half of the owners is free for who replaces this one
        self.replacing = False

    def numbers(self, patience: float | None = None) -> Numbers:
        """
        Add up what all workers count.

        Raises:
            TimeoutError: the loop does not answer within *patience* seconds.
        """
        numbers = Numbers()
        numbers.add(self.loop.ask(partial(read_numbers, self._router), patience))
        if self.workers is not None:
            numbers.add(self.workers.numbers())
        return numbers

    def status(self) -> dict[str, Any]:
        """
        Tell how the router is; to be called in its loop.
        """
        router = self._router
        return {
            "version": self._version,
            "ready": router.is_ready,
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
            "workers": {"running": 1 + self.running_workers, "of": router.settings.workers},
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


def _handfuls(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    return (ids[i : i + HANDFUL] for i in range(0, len(ids), HANDFUL))


def _tell_connection(connection: Connection) -> wire.Message:
    """
    Tell of a connection under way, as far as it has come.
    """
    route, backend, flow = connection.route, connection.backend, connection.flow
    address, port = connection.peer
    return {
        "id": connection.id,
        "route": route.host if route is not None else None,
        "client": address,
        "client_port": port,
        "backend": backend.name if backend is not None else None,
        "backend_address": connection.address if backend is not None else None,
        "backend_port": backend.port if backend is not None else None,
        "handoff": flow.handoff if flow is not None else None,
        "bytes_in": flow.bytes(CLIENT) if flow is not None else 0,
        "bytes_out": flow.bytes(BACKEND) if flow is not None else 0,
        "age": round(time.monotonic() - connection.began, 3),
        "quiet": flow.quiet() if flow is not None else None,
    }


def listen(path: Path, *, replacing: bool = False) -> socket.socket:
    """
    Make the control socket *path*, or, while *replacing* another router, one beside it.

    Raises:
        OSError: that is not possible; the message names the path.
    """
    if replacing:
        path = path.with_name(f"{path.name}.new")
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
