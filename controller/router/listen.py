"""
Listening and accepting.

Several sockets may listen on one address (SO_REUSEPORT): the kernel gives each new client to one of
them, by a hash, or as `steer` has it.
"""

import errno
import socket
import struct
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Final

from controller.router._native import ffi, lib
from controller.router.address import read_listen
from controller.router.batch import KEEPALIVE_IDLE
from controller.router.connection import Connection

if TYPE_CHECKING:
    from controller.router.router import Router

QUEUE: Final = 4096
"""Clients that may wait to be accepted; the kernel allows at most net.core.somaxconn."""

TOGETHER: Final = 16
"""Clients that are accepted before the first of them is routed: code that runs again and again is
in the processor's caches, and still nobody waits for a millisecond."""

# asm-generic/socket.h
_SO_ATTACH_FILTER: Final = 26
_SO_ATTACH_REUSEPORT_CBPF: Final = 51
_SO_DETACH_REUSEPORT_BPF: Final = 68

# linux/filter.h: codes of classic BPF, and the "address" of a random number
_LOAD: Final = 0x20
_MODULO: Final = 0x94
_ADD: Final = 0x04
_RETURN: Final = 0x16
_RETURN_CONSTANT: Final = 0x06
_RANDOM: Final = 0xFFFFF000 + 56


def accept(router: "Router", listener: int) -> int:
    """
    Accept what waits on *listener*, as many as one round may.

    Returns:
        0 when none is left or the round is full, an errno when accepting has to pause.
    """
    arrivals, error = router.arrivals, router.accept_error
    room, limit = router.accept_batch(), router.settings.hello_limit
    while room > 0:
        began = time.monotonic()
        count = lib.accept_clients(listener, limit, arrivals, min(room, TOGETHER), error)
        for arrival in arrivals[0:count]:
            connection = Connection(router, arrival.fd, arrival, began)
            router.connections[connection.id] = connection
            if router.trusts(connection.client[0]):
                router.loop.guard(connection.expect_header)
            else:
                router.loop.guard(connection.read, arrival.reading)
        router.batch.flush()
        if error[0]:
            return 0 if error[0] == errno.EAGAIN else int(error[0])
        room -= TOGETHER
    return 0


def bind(address: str, beside: Collection[str] = ()) -> socket.socket:
    """
    Bind a socket to *address*: `ADDR:PORT`, `[ADDR]:PORT` or `:PORT`.

    Others may listen there too from now on.  One that does so already is an error, unless the
    address, as `name` writes it, is in *beside*.

    Raises:
        ValueError: *address* is not written so.
        OSError: it can not be listened on.
    """
    host, port = read_listen(address)
    family = socket.AF_INET6 if ":" in host or not host else socket.AF_INET
    # plain TCP: a sockmap takes no MPTCP socket, and its clients fall back by themselves
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, bool(beside))
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(bool(host)))
        listener.bind((host or "::", port))
        if beside and name(listener) not in beside:
            listener.close()
            return bind(address)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        listener.close()
        raise
    return listener


def bind_listener(address: str, receive_buffer: int, beside: Collection[str] = ()) -> socket.socket:
    """
    Make a socket for clients to *address*; it does not listen yet.

    Raises:
        ValueError: as `bind`.
        OSError: as `bind`; the message names the address.
    """
    try:
        listener = bind(address, beside)
        # what accepted sockets inherit
        lib.socket_options(listener.fileno(), receive_buffer, KEEPALIVE_IDLE)
        # an urgent byte (RFC 6093) is one like any other: skipped, the counts would lack it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        # the hello comes with the accept, which spares a round; a silent client shows up later
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
        listener.setblocking(False)
    except OSError as err:
        raise OSError(err.errno, f"listen on {address}: {err.strerror}") from None
    return listener


def name(listener: socket.socket) -> str:
    """
    Write the address that *listener* is bound to, the same for all that are bound to it.
    """
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}"


def steer(listener: socket.socket, first: int, count: int) -> None:
    """
    Have the kernel give new clients of this address to *count* of its sockets, at random.

    *first* is the first of them in the order in which they began to listen.  A number that is none
    is no harm: the kernel goes by its hash then.
    """
    code = [(_LOAD, _RANDOM), (_MODULO, count), (_ADD, first), (_RETURN, 0)]
    _attach(listener, _SO_ATTACH_REUSEPORT_CBPF, code)


def steer_no_more(listener: socket.socket) -> None:
    """
    Undo `steer`.
    """
    listener.setsockopt(socket.SOL_SOCKET, _SO_DETACH_REUSEPORT_BPF, 0)


def deafen(listener: socket.socket) -> None:
    """
    Have *listener* hear of no new client: who comes by is not refused, and comes again in a second.
    """
    _attach(listener, _SO_ATTACH_FILTER, [(_RETURN_CONSTANT, 0)])


def _attach(listener: socket.socket, option: int, code: Sequence[tuple[int, int]]) -> None:
    # struct sock_filter: no jumps here
    program = b"".join(struct.pack("HBBI", opcode, 0, 0, operand) for opcode, operand in code)
    address = int(ffi.cast("uintptr_t", ffi.from_buffer(program)))
    listener.setsockopt(socket.SOL_SOCKET, option, struct.pack("HP", len(code), address))
