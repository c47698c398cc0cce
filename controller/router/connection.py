"""
A connection before its hand-off: peek at the hello, find the route, connect to a backend.

Rules of this file:

1. Nothing reaches a backend before a complete hello has chosen it.  A partial, odd or missing
   name never takes a default.
2. The hello is looked at, never taken: what moves the bytes sends it on first.
3. A connection keeps the route it was born with, whatever the table becomes.
"""

import errno
import os
import select
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from controller.core import alert
from controller.core.clientip import Choice
from controller.core.hello import HelloError, read_alpn, read_server_name, read_versions
from controller.core.proxyprotocol import (
    MAX_HEADER,
    Address,
    Header,
    NeedMore,
    ProxyHeaderError,
    Version,
    read_header,
    write_header,
)
from controller.core.routes import HANDOFFS, Backend, Route
from controller.core.session import BACKEND, CLIENT
from controller.router._native import ffi, lib
from controller.router.address import (
    backend_address,
    ip_version,
    pack,
    read_endpoint,
    readable,
    socket_address,
)
from controller.router.flow import UNTOUCHED, Flow, Handoff, Offer, Prelude, Refused
from controller.router.loop import Handler, Timer
from controller.router.note import Note
from controller.router.transparency import NO_REPLY, NOT_THERE
from controller.settings import ClientIp

if TYPE_CHECKING:
    from controller.router.router import Router

_ENDS: Final = select.EPOLLRDHUP | select.EPOLLHUP

WAITING: Final = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET

LAST_WORD: Final = 2.0
"""Seconds that a refused client has to read its alert and end its half."""

DISCARD_LIMIT: Final = 1024 * 1024
"""Bytes thrown away from a refused client before it is reset."""

_HELLO_RESULTS: Final[dict[int, tuple[str, int]]] = {
    lib.HELLO_EOF: ("client_closed", 0),
    lib.HELLO_RESET: ("client_closed", 0),
    lib.HELLO_NOT_TLS: ("not_tls", 0),
    lib.HELLO_TOO_LARGE: ("hello_too_large", alert.ILLEGAL_PARAMETER),
}


_SERVER_NAME, _ALPN, _VERSIONS, _ECH = (
    lib.EXT_SERVER_NAME,
    lib.EXT_ALPN,
    lib.EXT_VERSIONS,
    lib.EXT_ECH,
)

NO_HEADER: Final = Header(0)

UNDECIDED: Final = Choice(transparent=False)

_NO_WAY_BACK: Final = {
    errno.ETIMEDOUT,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EADDRNOTAVAIL,
    errno.EADDRINUSE,
    errno.EPERM,
}
"""What a dial from a client's address ends with where that address is the trouble."""


_PORT_TAKEN: Final = {errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES}
"""What a dial ends with where its port is another's, or not for us to take."""

PORT_TRIES: Final = 16
"""Ports that a dial tries: others' connections may have some of those that we choose from."""

_RANK: Final = {name: rank for rank, name in enumerate(HANDOFFS)}

DIAL: Final = struct.Struct("=28s28siii")
"""What a `struct dial` begins with."""


@dataclass(slots=True)
class Hello:
    """
    What the log and the metrics tell of a hello.
    """

    server_name: str | None = None
    alpn: tuple[bytes, ...] = ()
    versions: tuple[int, ...] = ()
    ech: bool = False
    size: int = 0
    seconds: float = 0.0


def _body(extension: Any) -> bytes | None:
    """
    Copy the body of an extension, None for one that is absent.
    """
    body = extension.body
    return ffi.unpack(body, extension.size) if body else None


def _send(fd: int, data: bytes) -> int:
    """
    Send what *fd* takes of *data* now.

    Raises:
        OSError: it takes nothing more, ever.
    """
    sent = lib.send_bytes(fd, data, len(data))
    if sent < 0:
        raise OSError(-sent, os.strerror(-sent))
    return int(sent)


class Connection:
    """
    One accepted client.
    """

    __slots__ = (
        "_connecting",
        "_header",
        "_hello_reader",
        "_leaves",
        "_peer",
        "_ports_tried",
        "_router",
        "_timer",
        "_tries",
        "backend",
        "began",
        "choice",
        "client",
        "connect_seconds",
        "dialled",
        "fd",
        "flow",
        "hello",
        "id",
        "offer",
        "refusals",
        "result",
        "route",
    )

    def __init__(self, router: "Router", fd: int, arrival: Any, began: float) -> None:
        self._router = router
        self.id = next(router.ids)
        self.fd = fd
        self._peer = self.client = read_endpoint(arrival.peer)
        self._header = NO_HEADER
        self._hello_reader = arrival.hello
        self._timer: Timer | None = None
        self._connecting = -1
        self._ports_tried = 0
        self._tries: list[Backend] = []
        self._leaves: list[Callable[[], None]] = []
        self.began = began
        self.dialled = 0.0
        self.connect_seconds = 0.0
        self.hello = Hello()
        self.route: Route | None = None
        self.backend: Backend | None = None
        self.choice = UNDECIDED
        self.offer: Offer | None = None
        self.flow: Flow | None = None
        self.refusals: list[str] = []
        self.result = ""

    @property
    def peer(self) -> Address:
        """
        The client's address and port, as far as a trusted sender tells them.
        """
        return readable(self.client)

    @property
    def address(self) -> str:
        """
        The backend's address for this connection.

        Of the client's family is only what is dialled from there: many a server has two addresses
        and listens on the first alone.
        """
        backend = self.backend
        assert backend is not None  # noqa: S101 - it is asked for when there is one
        if self.choice.transparent:
            return backend.reached_from(ip_version(self.client[0]))
        return backend.address

    # --- the PROXY header of a trusted sender ---

    def expect_header(self) -> None:
        """
        Read the header that a trusted sender puts before the hello.
        """
        self._release_reader()
        looked_at = self._router.looked_at
        size = lib.peek_bytes(self.fd, looked_at, MAX_HEADER)
        if size <= 0 and size != -errno.EAGAIN:
            self.refuse("client_closed", 0)
            return
        try:
            header = read_header(ffi.buffer(looked_at[0], max(size, 0))[:])
        except ProxyHeaderError:
            self.refuse("proxy_invalid", 0)
            return
        if isinstance(header, NeedMore):
            lib.wait_for_bytes(self.fd, header.at_least)
            self._wait(self._on_header)
            return
        # it is for nobody but us: what comes next is, to every hand-off, the first that came
        lib.drop_bytes(self.fd, header.size)
        self._header = header
        if header.source is not None:
            self.client = pack(header.source)
        self._hello_reader = lib.hello_new()
        if self._hello_reader == ffi.NULL:
            raise MemoryError
        self._peek()

    def _on_header(self, events: int) -> None:
        self.expect_header()
        if events & _ENDS and not self._header.size and not self.result:
            self.refuse("client_closed", 0)

    def _wait(self, handler: Handler) -> None:
        """
        Have *handler* hear when more has come, as long as a hello may take.
        """
        router = self._router
        if self._timer is None:
            self._timer = router.loop.later(router.settings.hello_timeout, self._too_slow)
        router.loop.watch(self.fd, WAITING, handler)

    # --- the hello ---

    def read(self, reading: Any) -> None:
        """
        Act on what a peek found.
        """
        hello = self.hello
        hello.size = reading.size
        status = reading.status
        if status == lib.HELLO_COMPLETE:
            hello.seconds = time.monotonic() - self.began
            self._end_wait()
            try:
                self._interpret(reading.extensions)
            except HelloError as err:
                self.refuse(err.result, err.alert or 0)
                return
            self._find()
        elif status == lib.HELLO_MORE:
            self._wait(self._on_more)
        elif status == lib.HELLO_INVALID:
            self.refuse("hello_invalid", reading.alert)
        else:
            self.refuse(*_HELLO_RESULTS[status])

    def _on_more(self, events: int) -> None:
        self._peek()
        if events & _ENDS and self._hello_reader != ffi.NULL:
            self.refuse("client_closed", alert.DECODE_ERROR)

    def _peek(self) -> None:
        reading = self._router.reading
        lib.hello_peek(self._hello_reader, self.fd, self._router.settings.hello_limit, reading)
        self.read(reading)

    def _too_slow(self) -> None:
        self._timer = None
        self.refuse("hello_timeout", alert.HANDSHAKE_FAILURE if self.hello.size else 0)

    def _interpret(self, extensions: Any) -> None:
        hello = self.hello
        alpn, versions = _body(extensions[_ALPN]), _body(extensions[_VERSIONS])
        if alpn is not None:
            hello.alpn = read_alpn(alpn)
        if versions is not None:
            hello.versions = read_versions(versions)
        hello.ech = bool(extensions[_ECH].body)
        name = _body(extensions[_SERVER_NAME])
        if name is None:
            raise HelloError("no_sni", alert.UNRECOGNIZED_NAME, "no server_name")
        hello.server_name = read_server_name(name)

    def _release_reader(self) -> None:
        if self._hello_reader != ffi.NULL:
            lib.hello_free(self._hello_reader)
            self._hello_reader = ffi.NULL

    def _end_wait(self) -> None:
        self._release_reader()
        self._cancel_timer()
        # what the client sends from here on is for whoever takes it over to hear
        self._router.loop.handlers.pop(self.fd, None)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # --- the backend ---

    def _find(self) -> None:
        name = self.hello.server_name
        assert name is not None  # noqa: S101 - a hello without a name is refused
        self.route = self._router.table.find(name)
        if self.route is None:
            self.refuse("no_route", alert.UNRECOGNIZED_NAME)
            return
        self._tries = self._router.order(self.route)
        self._dial_next()

    def _dial_next(self) -> None:
        """
        Dial the next backend of the pool, from the client's address where that may be.
        """
        transparency = self._router.transparency
        while self._tries:
            self.backend = self._tries.pop()
            choice = transparency.choose(self.client[0], self.backend)
            if not choice.refuse:
                self._dial(choice)
                return
            self._router.connect_error(self, choice.reason)
        self.refuse("connect_failed", alert.INTERNAL_ERROR)

    def _dial(self, choice: Choice) -> None:
        """
        Connect to the backend, together with others that are to.
        """
        self.choice = choice
        self._ports_tried = 0
        self.dialled = time.monotonic()
        self._router.batch.dial(self)

    def write_dial(self, dials: Any, at: int) -> None:
        """
        Write the `struct dial` to dial by, into the buffer *dials* at *at*.
        """
        backend = self.backend
        assert backend is not None  # noqa: S101 - it is about to be dialled
        address = backend_address(self.address, backend.port)
        source = socket_address(*self.client) if self.choice.transparent else b""
        like, port = self._router.likeness(self, self._ports_tried)
        if not port:
            # the kernel has tried them all
            self._ports_tried = PORT_TRIES
        DIAL.pack_into(dials, at, address, source, len(address), like, port)

    def on_dialled(self, fd: int, connected: int) -> None:
        """
        Hear that *fd* is connected, or going to be; or of an error, -errno.
        """
        if fd < 0:
            self._failed_to_connect(-fd)
            return
        self._connecting = fd
        if connected:
            self._router.batch.hand_over(self)
            return
        router, settings = self._router, self._router.settings
        router.loop.handlers[fd] = self._on_connected
        tried = self.choice.transparent and self._may_be_nat
        patience = settings.transparent_timeout if tried else settings.connect_timeout
        self._timer = router.loop.later(patience, self._connect_timeout)

    @property
    def _may_be_nat(self) -> bool:
        backend = self.backend
        assert backend is not None  # noqa: S101 - it was dialled
        return self._router.transparency.mode(backend) == ClientIp.AUTO

    def _failed_to_connect(self, error: int) -> None:
        """
        After *error*, dial the same backend in another way where that is worth a try, or the next.

        Only silence is taken for a way back that is missing: a refusal may be meant for just this
        client.  But at an address of the backend's second family it means that nothing listens.
        """
        backend, router = self.backend, self._router
        assert backend is not None  # noqa: S101 - it was dialled
        if self._connecting >= 0:
            router.loop.close(self._connecting)
            self._connecting = -1
        elif error in _PORT_TAKEN and self._ports_tried < PORT_TRIES:
            self._ports_tried += 1
            router.batch.dial(self)
            return
        if self.choice.transparent and self._may_be_nat:
            if error in _NO_WAY_BACK:
                self._dial(NO_REPLY)
                return
            if error == errno.ECONNREFUSED and self.address != backend.address:
                self._dial(NOT_THERE)
                return
        router.connect_error(self, errno.errorcode.get(error, str(error)).lower())
        self._dial_next()

    def _connect_timeout(self) -> None:
        self._timer = None
        self._failed_to_connect(errno.ETIMEDOUT)

    def _on_connected(self, events: int) -> None:
        self._cancel_timer()
        if events & (select.EPOLLERR | select.EPOLLHUP):
            self._failed_to_connect(lib.socket_error(self._connecting) or errno.ECONNRESET)
        else:
            self._router.batch.hand_over(self)

    # --- the hand-off ---

    def make_offer(self) -> None:
        """
        Write what comes before the hand-off, the PROXY header, and offer both sockets.
        """
        backend = self.backend
        assert backend is not None  # noqa: S101 - it is connected
        self.connect_seconds = time.monotonic() - self.dialled
        prelude = UNTOUCHED
        header = self._header_for(backend) if backend.proxy_protocol != "off" else b""
        if header:
            try:
                # the first bytes of a connection find its send buffer empty
                _send(self._connecting, header)
            except OSError as err:
                self._failed_to_connect(err.errno or errno.EIO)
                return
        if header or self._header.size:
            prelude = Prelude(self._header.size, len(header))
        self.offer = Offer(self.fd, self._connecting, self.on_over, prelude)

    def may_have(self, handoff: Handoff) -> bool:
        """
        Whether the backend may have *handoff*: the best that is asked for, or one below.
        """
        backend = self.backend
        assert backend is not None  # noqa: S101 - it is connected
        return _RANK[handoff.name] >= _RANK[backend.handoff]

    def on_taken(self, handoff: Handoff, taken: Flow | Exception) -> None:
        """
        Hear what *handoff* has made of the offer, which stands until it is taken.

        A backend that fails now is one that did not accept: see `_failed_to_connect`.
        """
        offer = self.offer
        assert offer is not None  # noqa: S101 - there was one to take
        if isinstance(taken, Refused):
            self.refusals.append(f"{handoff.name}: {taken}")
            if taken.prelude is not None:
                self.offer = offer._replace(prelude=taken.prelude)
            if taken.leave is not None:
                self._leaves.append(taken.leave)
            self._router.refused(handoff.name, str(taken))
            return
        self.offer = None
        if isinstance(taken, Flow):
            self._connecting = -1
            self.flow = taken
            self.result = "forwarded"
            self._router.handed_over(self)
        elif isinstance(taken, OSError):
            self._failed_to_connect(taken.errno or errno.EIO)
        else:
            raise taken

    def _header_for(self, backend: Backend) -> bytes:
        local = self._header.destination
        if local is None:
            endpoint = ffi.new("struct endpoint *")
            lib.local_endpoint(self.fd, endpoint)
            local = readable(read_endpoint(endpoint))
        hello = self.hello
        return write_header(
            cast("Version", backend.proxy_protocol),
            self.peer,
            local,
            authority=hello.server_name,
            alpn=hello.alpn[0] if hello.alpn else None,
        )

    def on_over(self, flow: Flow) -> None:
        """
        Take note of the end of *flow*.
        """
        self._router.ended(self, flow.session.reason)
        for leave in self._leaves:
            leave()

    # --- the end of one that was not handed over ---

    def refuse(self, result: str, code: int) -> None:
        """
        Answer the TLS alert *code* (0 for none) and close; count it as *result*.
        """
        self.result = result
        self._end_wait()
        loop = self._router.loop
        word = alert.alert(code) if code else b""
        rest = lib.refuse(self.fd, word, len(word), DISCARD_LIMIT)
        if rest != 1:
            self._close(reset=rest < 0)
            return
        self._timer = loop.later(LAST_WORD, self._close)
        loop.watch(self.fd, WAITING, self._on_last_word)

    def _on_last_word(self, _: int) -> None:
        rest = lib.discard(self.fd, DISCARD_LIMIT)
        if rest != 1:
            self._close(reset=rest < 0)

    def _close(self, *, reset: bool = False) -> None:
        self._cancel_timer()
        self._router.loop.close(self.fd, reset=reset)
        self._router.ended(self, self.result)

    def cut(self, reason: str) -> None:
        """
        End the connection now, wherever it is.
        """
        if self.flow is not None:
            self.flow.cut(reason)
            return
        self._end_wait()
        self.offer = None
        if self._connecting >= 0:
            self._router.loop.close(self._connecting)
        self.result = self.result or reason
        self._close(reset=True)

    def note(self) -> Note:
        """
        Take down what a later router has to know of this connection.
        """
        route, backend = self.route, self.backend
        assert route is not None  # noqa: S101 - it was handed over
        assert backend is not None  # noqa: S101 - as above
        return Note(
            began=time.time() - (time.monotonic() - self.began),
            route=route.host,
            backend=backend.name,
            source=backend.source,
            client=self.peer,
            transparent=self.choice.transparent,
            server_name=self.hello.server_name,
        )

    def record(self, reason: str) -> dict[str, Any]:
        """
        Tell the connection as one line of the log.
        """
        hello, flow = self.hello, self.flow
        address, port = self.peer
        line: dict[str, Any] = {
            "client": address,
            "client_port": port,
            "result": self.result,
            "reason": reason,
            "server_name": hello.server_name,
            "alpn": [protocol.decode("ascii", "backslashreplace") for protocol in hello.alpn],
            "tls_versions": hello.versions,
            "ech": hello.ech,
            "hello_bytes": hello.size,
            "hello_seconds": round(hello.seconds, 6),
            "duration": round(time.monotonic() - self.began, 6),
        }
        if self._header.size:
            line["sender"], line["sender_port"] = readable(self._peer)
        if self.route is not None:
            line["route"] = self.route.host
        if self.backend is not None:
            line["backend"] = self.backend.name
            line["backend_address"] = self.address
            line["backend_port"] = self.backend.port
        if flow is not None:
            line["handoff"] = flow.handoff
            line["client_ip"] = "transparent" if self.choice.transparent else "nat"
            if self.choice.reason:
                line["client_ip_reason"] = self.choice.reason
            line["connect_seconds"] = round(self.connect_seconds, 6)
            line["bytes_in"] = flow.bytes(CLIENT)
            line["bytes_out"] = flow.bytes(BACKEND)
        if self.refusals:
            line["refused_by"] = self.refusals
        return line
