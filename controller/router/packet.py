"""
The `packet` hand-off: the kernel makes one connection of two, and the router leaves its path.

The router's sockets are answerable for the hello until the backend has acknowledged it; then they
go without a word, and client and backend speak TCP to each other.  A flow needs no router: it
outlives one that is killed, and is taken over by the next.

Rules of this file:

1. A flow that is not eligible is refused before the install, never after it.
2. A flow that ends is reset towards whoever does not know, and keeps its number for a while.
"""

import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import structlog

from bpfprog import MAX_FLOWS, QUARANTINE, Event, Installed, Kind, Packet, State
from bpfprog.packet import LIVE, OVER
from controller.core.packets import Endpoint, packet_too_big, tcp_reset
from controller.core.session import BACKEND, CLIENT, Side
from controller.router._native import ffi, lib
from controller.router.flow import Flow, Handoff, Offer, Refused, forgotten
from controller.router.loop import Loop
from controller.router.note import write_note
from controller.router.ports import Ports

if TYPE_CHECKING:
    from controller.router.connection import Connection

TICK: Final = 1.0
"""Seconds between looks at what has waited: acknowledgements, numbers in quarantine."""

CROWDED: Final = MAX_FLOWS // 4
"""Flows in quarantine from which on it is shorter: many connections a second end soon."""

SETTLED: Final = 1.0
"""Seconds that it has to be at least: a thousand times what a processor is at work on a packet."""

REAPED_TOGETHER: Final = 64
"""Flows that end before it is looked again for some to free, while there is a crowd."""

NOTE_AFTER: Final = 1.0
"""Seconds that a connection must have lasted to be worth a note."""

IDLE_TICKS: Final = 60
"""Ticks between looks for idle flows."""

_ACKED, _ENDED, _RESET, _FRAGMENT, _TOO_BIG, _UNANSWERED = map(
    int, (Kind.ACKED, Kind.ENDED, Kind.RESET, Kind.FRAGMENT, Kind.TOO_BIG, Kind.UNANSWERED)
)

_FIN: Final = "client_fin", "backend_fin"
_RST: Final = "client_rst", "backend_rst"

_EPOLLIN: Final = 1
_MAPPED: Final = bytes(10) + b"\xff\xff"
_CONNTRACK: Final = Path("/proc/sys/net/netfilter/nf_conntrack_count")
_NETLINK_NETFILTER: Final = 12

log = structlog.get_logger()


class PacketHandoff(Handoff):
    """
    The rung.
    """

    name = "packet"

    def __init__(
        self,
        loop: Loop,
        packet: Packet,
        patience: float,
        idle: float,
    ) -> None:
        """
        Hand over to *packet*; *patience* is how long a backend has to acknowledge the hello.
        """
        self.loop = loop
        self.packet = packet
        self.patience = patience
        self.idle = idle
        self.ports = Ports()
        self.flows: dict[int, PacketFlow] = {}
        self.is_on = True
        self.without_sockets = 0
        self.detached = False
        self._retired = ""
        self.on_freed: Callable[[], None] = lambda: None
        self.on_drained: Callable[[], None] = lambda: None
        self._serial = time.time_ns()
        self._waiting: deque[tuple[float, PacketFlow]] = deque()
        self._unnoted: deque[tuple[float, Connection]] = deque()
        self._over: deque[tuple[float, int, int]] = deque()
        self._crowd = CROWDED
        self._lost = packet.lost_events
        self._ticks = 0
        self._conntrack = _open_conntrack()
        self._tracks = self._conntrack is not None and _is_tracking()
        loop.watch(packet.events_fd, _EPOLLIN, self._on_events)
        loop.later(TICK, self._tick)

    # --- new flows ---

    def take_all(self, offers: Sequence[Offer]) -> list[Flow | Exception]:
        """
        Make one connection of each two.
        """
        if not self.is_on:
            return [Refused("off") for _ in offers]
        return [*self.install(offers)]

    def install(
        self, offers: Sequence[Offer], *, anywhere: bool = False
    ) -> "list[PacketFlow | Exception]":
        """
        Make flows, as `take_all` does; *anywhere* is for a trial.
        """
        first = self._serial + 1
        self._serial += len(offers)
        # what a sender's header says is nobody's address here
        pairs = [(client, backend, prelude.taken > 0) for client, backend, _, prelude in offers]
        installed = self.packet.install(pairs, first, anywhere=anywhere)
        return [self._begin(offer, result) for offer, result in zip(offers, installed, strict=True)]

    def _begin(self, offer: Offer, installed: Installed | str) -> "PacketFlow | Exception":
        if isinstance(installed, str):
            return Refused(installed)
        try:
            return self._stand_for(offer, *installed)
        except Exception as err:  # noqa: BLE001 - the pair's, and none of the others'
            self._undo(installed.number)
            return err

    def _undo(self, number: int) -> None:
        """
        Give a flow up that was installed, and begun as far as may be.
        """
        self.packet.end(number)
        flow = self.flows.get(number)
        if flow is None:
            self._over.append((self.loop.now, number, self.packet.flow(number).serial))
        else:
            self.without_sockets -= flow.without_sockets
            self.gone(flow)

    def _stand_for(
        self,
        offer: Offer,
        number: int,
        sent: bool,  # noqa: FBT001 - as installed
        is_open: bool,  # noqa: FBT001
    ) -> "PacketFlow":
        flow = PacketFlow(self, number, (offer.client, offer.backend), offer.over)
        self._enter(flow)
        self.loop.handlers.pop(offer.backend, None)
        if is_open:
            flow.acknowledged()
        elif sent:
            self._waiting.append((self.loop.now + self.patience, flow))
        else:
            self.loop.soon(partial(flow.cut, "hello_unsent"))
        return flow

    def _enter(self, flow: "PacketFlow") -> None:
        flow.entry = self.packet.entry(flow.number)
        self.ports.take(flow.entry)
        self.flows[flow.number] = flow

    def note_later(self, connection: "Connection") -> None:
        """
        Keep with *connection*'s flow what the next router has to know of it, if it lasts.
        """
        self._unnoted.append((self.loop.now + NOTE_AFTER, connection))

    def adopt(
        self,
        is_left: Callable[[int], bool],
        enter: "Callable[[PacketFlow, bytes], Callable[[Flow], None]]",
    ) -> int:
        """
        Take over the flows of routers that are no more, and tell the ends of those that are over.

        *is_left* says whose they are; *enter* is given each flow and what is noted of it, and
        answers who hears of its end.

        Returns:
            How many are under way.
        """
        adopted = 0
        for number in self.packet.numbers():
            native = self.packet.flow(number)
            if not is_left(native.owner):
                continue
            self.packet.adopt(number)
            if native.state == State.CLAIMED:
                self.packet.reap(number, native.serial)
                continue
            if native.told:
                self._over.append((self.loop.now, number, native.serial))
                continue
            flow = PacketFlow(self, number, None, forgotten)
            flow.hear_of_end(enter(flow, self.packet.read_note(number)))
            self._enter(flow)
            self.without_sockets += 1
            self.packet.acknowledged(number)
            self._waiting.append((self.loop.now + self.patience, flow))
            flow.look()
            adopted += not flow.session.over
        return adopted

    # --- the switch ---

    def off(self) -> None:
        """
        Take no more connections; when those under way have ended, leave nothing behind.
        """
        self.is_on = False

    def on(self) -> None:
        """
        Take connections again.

        Raises:
            ValueError: all has been taken down meanwhile.
        """
        if self._retired:
            raise ValueError(f"not in use here: {self._retired}")
        if self.detached:
            raise ValueError("detached: a router that starts anew attaches it again")
        self.is_on = True

    def retire(self, reason: str) -> None:
        """
        Be off for good, for *reason*: there are only the flows that an earlier router has left.
        """
        self._retired = reason
        self.off()

    @property
    def is_switched_off(self) -> bool:
        """
        Whether somebody has switched it off.
        """
        return not (self.is_on or self._retired)

    def close(self) -> None:
        """
        Leave nothing behind; but if there are flows, all: they go on, for the next router.
        """
        if not self.packet.is_alone():
            return
        # those of other workers, which have ended, too
        flows = sum(self.packet.flow(number).state in LIVE for number in self.packet.numbers())
        if flows:
            log.info("flows left", flows=flows)
        else:
            self.packet.unpin()

    def status(self) -> dict[str, Any]:
        """
        Tell how it is.
        """
        state = "detached" if self.detached else "on" if self.is_on else "off"
        if self._retired:
            state = "not in use"
        attached = self.packet.devices
        return {
            "state": state,
            "flows": len(self.flows),
            "devices": sorted(name for number, name in socket.if_nameindex() if number in attached),
            "pins": str(self.packet.directory),
        }

    # --- events ---

    def _on_events(self, _: int) -> None:
        for event in self.packet.events():
            flow = self.flows.get(event.flow)
            if flow is not None:
                self._guarded(flow, flow.hear, event)
            elif event.kind == _UNANSWERED and self.packet.flow(event.flow).state == State.RESET:
                self.reset(event.flow, event.end)

    def _guarded(self, flow: "PacketFlow", action: Callable[..., None], *args: Event) -> None:
        """
        Have a fault cost one flow, and none of the others whose events came with it.
        """
        try:
            action(*args)
        except Exception as err:  # noqa: BLE001 - as in the loop, whose handler this is
            self.loop.fault(flow.hear, err)

    def _tick(self) -> None:
        self.loop.later(TICK, self._tick)
        now = self.loop.now
        self._tracks = self._conntrack is not None and _is_tracking()
        # not at each event: whoever makes events come thick could have us look all the time
        if self._lost != self.packet.lost_events:
            self._lost = self.packet.lost_events
            for flow in tuple(self.flows.values()):
                self._guarded(flow, flow.look)
        self._look_at_waiting(now)
        self._reap(QUARANTINE)
        self._crowd = max(CROWDED, len(self._over))
        drained = not (self.is_on or self.detached or self.packet.numbers())
        if drained and self.packet.is_alone():
            self.detached = True
            self.on_drained()
            self.packet.unpin()
        self._ticks += 1
        if self._ticks % IDLE_TICKS == 0:
            for number in self.packet.idle(max(0, int(time.monotonic() - self.idle))):
                if number in self.flows:
                    self.flows[number].cut("idle")

    def _look_at_waiting(self, now: float) -> None:
        """
        See to flows whose hello is not acknowledged in time, and note those that last.
        """
        waiting = self._waiting
        while waiting and (waiting[0][1].is_open or now > waiting[0][0]):
            flow = waiting.popleft()[1]
            flow.look()
            if not flow.is_open:
                flow.cut("hello_unacknowledged")
        while self._unnoted and now > self._unnoted[0][0]:
            connection = self._unnoted.popleft()[1]
            lasting = connection.flow
            if isinstance(lasting, PacketFlow) and not lasting.session.over:
                self.packet.note(lasting.number, write_note(connection.note()))

    # --- ends ---

    def gone(self, flow: "PacketFlow") -> None:
        """
        Take note of the end of *flow*: its number is free after a while.
        """
        del self.flows[flow.number]
        native = flow.native
        native.told = 1
        self.ports.give_back(flow.entry)
        self._over.append((self.loop.now, flow.number, native.serial))
        if len(self._over) > self._crowd:
            self._reap(SETTLED)
            self._crowd = max(CROWDED, len(self._over)) + REAPED_TOGETHER

    def _reap(self, age: float) -> None:
        """
        Free the numbers of the flows that have been over for *age* seconds.
        """
        over, until = self._over, self.loop.now - age
        while over and over[0][0] <= until:
            _, number, serial = over.popleft()
            if not self.packet.reap(number, serial):
                over.append((self.loop.now, number, serial))

    def reap_now(self) -> None:
        """
        Free the numbers of all that has ended, which no packet can find: they were trials.
        """
        self._reap(0)

    def reset(self, number: int, end: int) -> None:
        """
        Send a RST to one end of a flow, as if the other had.
        """
        flow = self.packet.flow(number)
        local, remote = _endpoints(flow.ways[1 - end].out)
        way = flow.ways[end]
        ack = (way.next + way.fin_seen) & 0xFFFFFFFF
        self.packet.emit(tcp_reset(local, remote, way.acked, ack), flow.ways[1 - end].ifindex)

    def too_big(self, event: Event) -> None:
        """
        Tell an end of a flow that what it has sent is larger than the way to the other takes.
        """
        flow = self.packet.flow(event.flow)
        local, remote = _endpoints(flow.ways[1 - event.end].out)
        self.packet.emit(
            packet_too_big(remote, local, event.seq, event.mtu), flow.ways[1 - event.end].ifindex
        )

    def forget_tracks(self, number: int) -> None:
        """
        Delete what netfilter knows of a flow's two connections: it would keep it for days.
        """
        if self._tracks and self._conntrack is not None:
            address = int(ffi.cast("uintptr_t", self.packet.address(number)))
            lib.conntrack_forget(self._conntrack.fileno(), ffi.cast("void *", address))


class PacketFlow(Flow):
    """
    One connection whose packets are translated.
    """

    handoff = "packet"
    outlives_sockets: ClassVar[bool] = True

    __slots__ = (
        "_before",
        "_handoff",
        "_is_settled",
        "entry",
        "native",
        "number",
        "without_sockets",
    )

    def __init__(
        self,
        handoff: PacketHandoff,
        number: int,
        fds: tuple[int, int] | None,
        over: Callable[[Flow], None],
    ) -> None:
        """
        Stand for the flow *number*, which has sockets yet unless *fds* is None.
        """
        super().__init__(handoff.loop, fds or (-1, -1), over)
        self._handoff = handoff
        self.number = number
        self.native = handoff.packet.flow(number)
        self.entry = b""
        self.without_sockets = fds is None
        self._is_settled = False
        self._before = (0, 0) if fds else (self.bytes(CLIENT), self.bytes(BACKEND))

    @property
    def endpoints(self) -> tuple[Endpoint, Endpoint]:
        """
        The client's address and port, and the backend's.
        """
        ways = self.native.ways
        return _endpoints(ways[BACKEND].out)[1], _endpoints(ways[CLIENT].out)[1]

    def hear_of_end(self, over: Callable[[Flow], None]) -> None:
        """
        Have *over* hear of the end.
        """
        self._over = over

    @property
    def is_open(self) -> bool:
        """
        Whether the hello is acknowledged, or all is over.
        """
        return bool(self.session.over or self.native.state != State.HELLO)

    @property
    def holds_sockets(self) -> bool:
        """
        Whether the backend has yet to acknowledge the hello.
        """
        return not self.without_sockets

    def hear(self, event: Event) -> None:
        """
        Act on what the programs tell.
        """
        kind = event.kind
        if kind == _ENDED:
            self._ended(_FIN[self.native.first])
        elif kind == _RESET:
            self._ended(_RST[event.end])
        elif kind == _ACKED:
            self.acknowledged()
        elif kind == _TOO_BIG:
            self._handoff.too_big(event)
        elif kind == _FRAGMENT:
            self.cut("fragment")
        elif kind == _UNANSWERED:
            self._handoff.reset(self.number, event.end)
        else:
            self.look()

    def look(self) -> None:
        """
        See what has become of the flow, whatever events were lost.
        """
        flow = self.native
        state = flow.state
        if state == State.OPEN:
            self.acknowledged()
        elif state == State.ENDED:
            self._ended(_FIN[flow.first])
        elif state in OVER:
            self._ended(_RST[flow.first])

    def acknowledged(self) -> None:
        """
        Let the sockets go, if they are here: the backend has all that they were answerable for.
        """
        if not self.session.over:
            self._settle()

    def _settle(self) -> None:
        """
        Have this host know nothing more of the two connections that it had.
        """
        if self._is_settled:
            return
        self._is_settled = True
        self._handoff.forget_tracks(self.number)
        if self.without_sockets:
            return
        self.without_sockets = True
        self._handoff.without_sockets += 1
        for fd in self.fds:
            self.loop.vanish(fd)
        self._handoff.on_freed()

    def _ended(self, reason: str) -> None:
        if self.session.over:
            return
        self.session.failed(reason)
        # it may have ended before anyone looked whether its hello was acknowledged
        self._settle()
        self._handoff.without_sockets -= 1
        over, self._over = self._over, forgotten
        over(self)
        self.release()

    def cut(self, reason: str) -> None:
        """
        End the connection now, with a RST to both, for *reason*.
        """
        if self.session.over:
            return
        self._handoff.packet.end(self.number)
        for side in Side:
            self._handoff.reset(self.number, side)
        self._ended(reason)

    def bytes(self, side: Side) -> int:
        """
        Count the bytes that *side* has sent.
        """
        counted: int = self.native.ways[side].bytes
        return counted

    def moved(self, side: Side) -> int:
        """
        Count those of them that went since this router has known the flow.
        """
        return self.bytes(side) - self._before[side]

    def quiet(self) -> float:
        """
        Seconds since a packet came from either end, to a second.
        """
        ways = self.native.ways
        heard = max(ways[0].heard, ways[1].heard)
        return max(0.0, time.monotonic() - float(heard))

    def release(self) -> None:
        """
        Give the number back.
        """
        self._handoff.gone(self)


def _open_conntrack() -> socket.socket | None:
    """
    Reach netfilter's table of connections; None where the kernel has none.
    """
    try:
        return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_NETFILTER)
    except OSError:
        return None


def _is_tracking() -> bool:
    """
    Whether netfilter tracks any connection here.
    """
    try:
        return int(_CONNTRACK.read_text()) > 0
    except (OSError, ValueError):
        return False


def _address(words: Any) -> bytes:
    packed: bytes = ffi.buffer(words)[:]
    return packed[12:] if packed.startswith(_MAPPED) else packed


def _endpoints(out: Any) -> tuple[Endpoint, Endpoint]:
    """
    Read the two endpoints of a `struct tuple`.
    """
    return (
        (_address(getattr(out, "from")), socket.ntohs(out.from_port)),
        (_address(out.to), socket.ntohs(out.to_port)),
    )
