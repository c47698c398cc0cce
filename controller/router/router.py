"""
What the connections of one router share: the table, the ladder of hand-offs, the counts.
"""

import contextlib
import errno
import gc
import itertools
import select
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import ip_address
from typing import Any, Final

import structlog

from bpfprog import MAX_CONNECTIONS, MAX_OWNERS
from controller.core.routes import HANDOFFS, Backend, Route, RouteTable
from controller.core.session import BACKEND, CLIENT
from controller.log import connection as write_line
from controller.router._native import ffi, lib
from controller.router.address import pack
from controller.router.adopted import Adopted
from controller.router.batch import Batch
from controller.router.connection import PORT_TRIES, Connection
from controller.router.devices import Devices
from controller.router.flow import Flow, Handoff
from controller.router.listen import QUEUE, TOGETHER, accept, deafen
from controller.router.loop import Loop
from controller.router.packet import PacketFlow, PacketHandoff
from controller.router.stats import Stats
from controller.router.transparency import Transparency
from controller.settings import Network, RouterSettings

ACCEPT_BATCH: Final = 64
"""Clients accepted in one round, so that those under way have their turn."""

PACKET_TOO: Final = HANDOFFS[: HANDOFFS.index("packet") + 1]
"""What a backend may ask for that allows the packet hand-off."""

OWNERS: Final = MAX_OWNERS // 2
"""Owners of flows that one router may have: another half is for the one that replaces it."""

LAST_OTHERS: Final = 2.0
"""Seconds that worker 0 waits for the others at the end of a drain, when they cut theirs too."""

ACCEPT_PAUSE: Final = 0.1
"""Seconds without accepting when the kernel has no descriptor or memory left for it."""

EPOLLIN: Final = 1

log = structlog.get_logger()


def _membership(networks: Sequence[Network]) -> Callable[[bytes], bool]:
    """
    Make a quick test whether a packed address lies in one of *networks*.
    """
    if not networks:
        return lambda _: False

    @lru_cache(4096)
    def contains(address: bytes) -> bool:
        ip = ip_address(address)
        return any(ip in network for network in networks if network.version == ip.version)

    return contains


@dataclass(frozen=True, slots=True)
class Traffic:
    """
    Connections handed over, by route and hand-off, and those not yet; bytes, by direction as well.
    """

    active: Counter[tuple[str, str]]
    pending: int
    moved: Counter[tuple[str, str, str]]


class Router:
    """
    One router: its loop, and everything that happens in it.
    """

    def __init__(
        self, settings: RouterSettings, loop: Loop, max_connections: int, worker: int = 0
    ) -> None:
        self.settings = settings
        self.loop = loop
        self.worker = worker
        self.owner = 0
        self.others: set[int] = set()
        self.max_connections = min(max_connections, MAX_CONNECTIONS)
        self.table = RouteTable(0, ())
        self.table_since = 0.0
        self.ladder: Sequence[Handoff] = ()
        self.ladder_reason = ""
        self.packet: PacketHandoff | None = None
        self.packet_reason = "not tried"
        self.devices: Devices | None = None
        self.transparency = Transparency(settings)
        self.stats = Stats()
        # no two workers' connections have one id
        self.ids = itertools.count(worker or settings.workers, settings.workers)
        self.connections: dict[int, Connection] = {}  # in the order of their ids
        self.arrivals: Any = ffi.new("struct arrival[]", TOGETHER)
        self.accept_error: Any = ffi.new("int *")
        self.reading: Any = ffi.new("struct reading *")
        self.batch = Batch(self)
        loop.round_ends.append(lib.hello_restock)
        self.looked_at: Any = ffi.new("const unsigned char **")
        self.trusts = _membership(settings.proxy_protocol_from)
        self.draining = False
        self.listeners: list[socket.socket] = []
        self.held: list[socket.socket] = []
        self.closed = threading.Event()
        self._accepting = False
        self._turns: dict[str, int] = {}

    def start(self) -> None:
        """
        Begin what goes on beside the loop, in threads.
        """
        self.transparency.start()
        if self.devices is not None:
            self.devices.start()

    def stop(self) -> None:
        """
        End that.
        """
        self.transparency.stop()
        if self.devices is not None:
            self.devices.stop()
        if self.packet is not None:
            self.packet.close()

    # --- accepting ---

    def listen(
        self, listeners: Iterable[socket.socket], others: Iterable[socket.socket] = ()
    ) -> None:
        """
        Begin to listen, and to accept from *listeners*; *others* are other workers' to accept from.
        """
        mine = [*listeners]
        for listener in (*mine, *others):
            listener.listen(QUEUE)
        self.serve(mine, others)

    def serve(
        self, listeners: Iterable[socket.socket], others: Iterable[socket.socket] = ()
    ) -> None:
        """
        Begin to accept from *listeners*, which listen, as do *others*, which are to be held.
        """
        self.held = [*listeners, *others]
        self._accept_from([*listeners])

    def stand_in(self, worker: int, listeners: Sequence[socket.socket]) -> None:
        """
        Accept for another *worker*, which has ended.
        """
        self.others.discard(worker)
        if self.held:
            self._accept_from([*self.listeners, *listeners])
        self._stop_if_idle()

    def stand_down(self, worker: int, listeners: Sequence[socket.socket]) -> None:
        """
        Leave it to another *worker*, which is back.
        """
        self.others.add(worker)
        self._accept_from([mine for mine in self.listeners if mine not in listeners])

    def _accept_from(self, listeners: list[socket.socket]) -> None:
        self._pause()
        self.listeners = listeners
        self._resume()

    @property
    def is_ready(self) -> bool:
        """
        Whether clients are welcome, and can be routed.
        """
        return self.table.generation > 0 and bool(self.held) and not self.draining

    @property
    def holding(self) -> int:
        """
        How many connections hold sockets: those handed over as packets do not.
        """
        return len(self.connections) - (self.packet.without_sockets if self.packet else 0)

    def accept_batch(self) -> int:
        """
        How many clients may be accepted now.
        """
        return min(ACCEPT_BATCH, self.max_connections - self.holding)

    def _on_listener(self, listener: int) -> None:
        error = accept(self, listener)
        if error == errno.EINVAL:
            # worker 0 has ended the listening, and is about to say so
            self._pause()
        elif error:
            self.stats.accept_errors[errno.errorcode.get(error, str(error))] += 1
            log.warning("accept failed", error=errno.errorcode.get(error, str(error)))
            self._pause()
            self.loop.later(ACCEPT_PAUSE, self._resume)
        elif self.holding >= self.max_connections:
            self.stats.accept_errors["max_connections"] += 1
            self._pause()

    def _pause(self) -> None:
        if self._accepting:
            self._accepting = False
            for listener in self.listeners:
                self.loop.forget(listener.fileno())

    def _resume(self) -> None:
        # flows that are adopted may end before there is anything to accept from
        if self._accepting or not self.listeners:
            return
        self._accepting = True
        for listener in self.listeners:
            fd = listener.fileno()
            self.loop.watch(fd, EPOLLIN, lambda _, fd=fd: self._on_listener(fd))  # type: ignore[misc]

    # --- what connections ask and tell ---

    def order(self, route: Route) -> list[Backend]:
        """
        The backends of *route* in the order to try them, last first: each in its turn.
        """
        backends = route.backends
        if len(backends) == 1:
            return [backends[0]]
        turn = self._turns.get(route.host, 0) % len(backends)
        self._turns[route.host] = turn + 1
        return [*backends[turn:], *backends[:turn]][::-1]

    def likeness(self, connection: Connection, tried: int) -> tuple[int, int]:
        """
        Which socket the one to *connection*'s backend is to resemble, and the port to dial from.

        Both matter where packets of the one may become packets of the other.  *tried* ports were
        another's already.

        Returns:
            -1 for no socket, 0 for a port of the kernel's choice.
        """
        backend, packet = connection.backend, self.packet
        assert backend is not None  # noqa: S101 - it is about to be dialled
        own = connection.client[1] if connection.choice.transparent and not tried else 0
        like = -1
        if packet is not None and packet.is_on and backend.handoff in PACKET_TOO:
            like = connection.fd
        elif packet is None or packet.ports.are_apart:
            return like, own
        to = pack((connection.address, backend.port))
        if own and packet.ports.is_free(connection.client, to):
            return like, own
        return like, packet.ports.choose(to) if tried < PORT_TRIES else 0

    def connect_error(self, connection: Connection, error: str) -> None:
        """
        Take note that a backend did not accept, or may not be dialled; *error* is a word.
        """
        route, backend = connection.route, connection.backend
        assert route is not None  # noqa: S101 - a backend comes of a route
        assert backend is not None  # noqa: S101 - as above
        self.stats.connect_errors[route.host, error] += 1
        log.debug("connect failed", route=route.host, backend=backend.name, error=error)

    def refused(self, handoff: str, reason: str) -> None:
        """
        Take note that a hand-off did not take a connection.
        """
        self.stats.handoff_refusals[handoff, reason] += 1

    def handed_over(self, connection: Connection) -> None:
        """
        Take note that bytes move.
        """
        assert connection.route is not None  # noqa: S101 - it was handed over
        assert connection.backend is not None  # noqa: S101 - as above
        self.transparency.connected(
            connection.client[0], connection.backend, connection.choice, connection.began
        )
        self.stats.connected(connection.route.host, connection.connect_seconds)
        if (
            self.packet is not None
            and connection.flow is not None
            and connection.flow.outlives_sockets
        ):
            self.packet.note_later(connection)

    def ended(self, connection: Connection, reason: str) -> None:
        """
        Take note of the end of *connection*, while its counts still stand.
        """
        self.connections.pop(connection.id, None)
        self.stats.ended(connection)
        if self.settings.access_log:
            write_line(connection.record(reason))
        self.freed()

    def freed(self) -> None:
        """
        Take note that a connection holds no sockets any more.
        """
        if not self._accepting and self.holding < self.max_connections:
            self._resume()
        self._stop_if_idle()

    # --- the table ---

    def replace_table(self, table: RouteTable) -> None:
        """
        Route new connections by *table*; those under way keep their route.

        But where no socket tells of the end of a container, the table does.
        """
        others = table.alive != self.table.alive
        self.table = table
        self.table_since = self.loop.now
        if others:
            self._cut_off()
        self.transparency.keep(table)
        hosts = {route.host for route in table.routes}
        self._turns = {host: turn for host, turn in self._turns.items() if host in hosts}
        # a table is no garbage, however large: the collector need not look for any in it
        gc.freeze()
        self.stats.keep_routes(hosts | {c.route.host for c in self.connections.values() if c.route})

    def _adopt(self, is_left: Callable[[int], bool]) -> None:
        """
        Take over the flows of owners that have ended; *is_left* says whether one is.
        """
        if self.packet is None:
            return

        def enter(flow: PacketFlow, note: bytes) -> Callable[[Flow], None]:
            connection = Adopted(self, flow, note)
            self.connections[connection.id] = connection
            return connection.on_over

        if adopted := self.packet.adopt(is_left, enter):
            log.info("flows adopted", flows=adopted)
            self._cut_off()

    def adopt_own_half(self) -> None:
        """
        Take over what an earlier router, or this worker before it was restarted, has left.
        """
        self.adopt_half(self.owner // OWNERS)

    def adopt_half(self, half: int) -> None:
        """
        Take over this worker's share of what *half* of the owners have left.
        """
        workers = self.settings.workers
        self._adopt(lambda o: o // OWNERS == half and o % OWNERS % workers == self.worker)

    def adopt_rest(self, half: int) -> None:
        """
        Take over what no worker has taken of it: one may be about to start again.
        """
        self._adopt(lambda owner: owner // OWNERS == half)

    def kill(self, ids: Iterable[int]) -> list[int]:
        """
        Reset the connections of *ids* on both sides; tell which of them there were.
        """
        found = {i: self.connections[i] for i in ids if i in self.connections}
        for connection in found.values():
            connection.cut("killed")
        return list(found)

    def _cut_off(self) -> None:
        for connection in tuple(self.connections.values()):
            flow, backend = connection.flow, connection.backend
            if flow is None or backend is None or not flow.outlives_sockets:
                continue
            if self.table.lacks(backend.source, connection.address):
                connection.cut("backend_gone")

    # --- the end ---

    def drain(self, linger: float = 0) -> None:
        """
        Stop accepting; stop the loop when no connection needs us, or the time for it is over.

        For *linger* seconds those are still accepted who had begun to connect when all others went
        to another router.
        """
        if self.draining:
            return
        self.draining = True
        log.info(
            "draining",
            connections=self.holding,
            seconds=self.settings.drain,
            linger=linger,
        )
        if linger:
            self.loop.later(linger, self._close_when_empty)
        else:
            self._close()
        self.loop.later(linger + self.settings.drain, self._cut)

    def _close_when_empty(self) -> None:
        """
        Stop listening once nobody waits: closing a listener resets those in its queue.
        """
        waiting = select.poll()
        for listener in self.held:
            # who is given to one now, while they close one by one, would be lost
            try:
                deafen(listener)
            except OSError as err:
                log.warning("listener not deafened", error=err.strerror)
            waiting.register(listener, select.POLLIN)
        if waiting.poll(0):
            self.loop.later(ACCEPT_PAUSE, self._close_when_empty)
        else:
            self._close()

    def _close(self) -> None:
        self._pause()
        for listener in self.held:
            # for all that have it; the last of them would end it else
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RD)
            listener.close()
        self.listeners, self.held = [], []
        self.closed.set()
        self._stop_if_idle()

    def _stop_if_idle(self) -> None:
        if self.draining and not self.held and not self.holding and not self.others:
            self._stop()

    def _stop(self) -> None:
        self.loop.stopping = True

    def _cut(self) -> None:
        self._close()
        for connection in tuple(self.connections.values()):
            # the others need no router
            if connection.flow is None or connection.flow.holds_sockets:
                connection.cut("drain_timeout")
        if self.others:
            self.loop.later(LAST_OTHERS, self._stop)
        else:
            self._stop()

    def traffic(self) -> Traffic:
        """
        Count connections and bytes, those that have ended and those under way.
        """
        moved, active = Counter(self.stats.bytes), Counter[tuple[str, str]]()
        for connection in self.connections.values():
            flow, route = connection.flow, connection.route
            if flow is not None and route is not None:
                active[route.host, flow.handoff] += 1
                moved[route.host, "in", flow.handoff] += flow.moved(CLIENT)
                moved[route.host, "out", flow.handoff] += flow.moved(BACKEND)
        return Traffic(active, len(self.connections) - active.total(), moved)
