"""
Listening and accepting.
"""

import errno
import socket
import time
from typing import TYPE_CHECKING

from controller.router._native import lib
from controller.router.address import read_listen
from controller.router.connection import KEEPALIVE_IDLE, Connection

if TYPE_CHECKING:
    from controller.router.router import Router


def accept(router: "Router", listener: int) -> int:
    """
    Accept what waits on *listener*, as many as one round may.

    Returns:
        0 when none is left or the round is full, an errno when accepting has to pause.
    """
    arrival = router.arrival
    limit = router.settings.hello_limit
    for _ in range(router.accept_batch()):
        began = time.monotonic()
        fd = lib.accept_client(listener, limit, arrival)
        if fd >= 0:
            connection = Connection(router, fd, arrival, began)
            router.connections.add(connection)
            try:
                if router.trusts(connection.peer[0]):
                    connection.expect_header()
                else:
                    connection.read(arrival.reading)
            except Exception as err:  # noqa: BLE001 - the root of all that an arrival does
                router.loop.fault(connection.read, err)
        elif fd == -errno.EAGAIN:
            return 0
        elif fd not in (-errno.ECONNABORTED, -errno.EINTR, -errno.EPROTO):
            return -int(fd)
    return 0


def bind_listener(address: str, receive_buffer: int) -> socket.socket:
    """
    Listen on *address*: `ADDR:PORT`, `[ADDR]:PORT` or `:PORT`.

    Raises:
        ValueError: *address* is not written so.
        OSError: it can not be listened on; the message names the address.
    """
    host, port = read_listen(address)
    family = socket.AF_INET6 if ":" in host or not host else socket.AF_INET
    # plain TCP: a sockmap takes no MPTCP socket, and its clients fall back by themselves
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(bool(host)))
        # what accepted sockets inherit
        lib.socket_options(listener.fileno(), receive_buffer, KEEPALIVE_IDLE)
        # the hello comes with the accept, which spares a round; a silent client shows up later
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
        listener.bind((host or "::", port))
        listener.listen(4096)
        listener.setblocking(False)
    except OSError as err:
        listener.close()
        raise OSError(err.errno, f"listen on {address}: {err.strerror}") from None
    return listener
