"""
Prove a hand-off at start with real bytes on real sockets, through the code that will serve.

Kernels differ in how they move redirected data, and distributions patch them; a version number
says little.  So: what waits is moved by the kick, what comes later follows it, a FIN alone is
passed on while the other direction still works, a reader that stalls stops its writer within the
bound, and every byte then arrives in order, with the end behind the last of them.
"""

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Final

from bpfprog import sequence_numbers, silence
from controller.core.packets import HOPS, TCP, checksum, ip_header
from controller.router.flow import Flow, Handoff, Offer, Refused
from controller.router.loop import Loop
from controller.router.packet import PacketHandoff

PATIENCE: Final = 3.0
"""Seconds for the whole test; it takes about 0.1 s."""

STALLED: Final = 0.03
"""Seconds in which a blocked writer must not come on: several rounds of the kernel's worker."""

BOUND: Final = 32 * 1024 * 1024
"""Bytes that may be under way to a reader that does not read: limit, send and receive buffers of
four sockets.  Without a bound the whole of DATA is."""

DATA: Final = 48 * 1024 * 1024

HELLO: Final = b"a hello that is peeked at and stays queued, "

LATER: Final = b"and what the client says after it"

GREETING: Final = b"what a backend says before it has heard anything"

PIECE: Final = 256 * 1024


class SelfTestFailed(Exception):  # noqa: N818 - an outcome, not a fault of the program
    """
    The hand-off does not do here what it must; the message says what it did.
    """


def prove(loop: Loop, handoff: Handoff) -> None:
    """
    Send real bytes through *handoff*.

    Raises:
        SelfTestFailed: it must not be used here.
    """
    try:
        with contextlib.ExitStack() as stack:
            _Trial(loop, handoff, stack).run()
    except (BrokenPipeError, ConnectionResetError) as err:
        raise SelfTestFailed(f"half-close: it ended the other way too: {err.strerror}") from err
    except OSError as err:
        raise SelfTestFailed(f"no test connection: {err}") from err


def prove_packet(loop: Loop, handoff: PacketHandoff) -> None:
    """
    Make a flow of two connections over loopback, and have packets of theirs translated.

    What comes out is compared with the numbers that the kernel says the sockets are at; that they
    go without a word is seen at the other ends.

    Raises:
        SelfTestFailed: it must not be used here.
    """
    try:
        with contextlib.ExitStack() as stack:
            _PacketTrial(loop, handoff, stack).run()
    except OSError as err:
        raise SelfTestFailed(f"no trial flow: {err}") from err


class _Trial:
    def __init__(self, loop: Loop, handoff: Handoff, stack: contextlib.ExitStack) -> None:
        self._loop = loop
        self._handoff = handoff
        self._until = time.monotonic() + PATIENCE
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self._client, self._client_side = self._pair(listener, stack)
        self._backend_side, self._backend = self._pair(listener, stack)
        self._over = False
        self._flow: Flow | None = None
        stack.callback(self._cut)

    def _pair(
        self, listener: socket.socket, stack: contextlib.ExitStack
    ) -> tuple[socket.socket, socket.socket]:
        near = stack.enter_context(socket.create_connection(listener.getsockname(), PATIENCE))
        far = stack.enter_context(listener.accept()[0])
        near.setblocking(False)
        far.setblocking(False)
        return near, far

    def run(self) -> None:
        self._client.sendall(HELLO)
        self._backend.sendall(GREETING)
        self._wait(lambda: _peek(self._client_side) == HELLO, "hello")
        self._wait(lambda: _peek(self._backend_side) == GREETING, "greeting")
        self._take()
        self._wait(lambda: _peek(self._client) == GREETING, "kick: what was queued did not move")
        self._client.recv(len(GREETING))
        self._client.sendall(LATER)
        self._wait(lambda: _peek(self._backend) == HELLO + LATER, "hello: it did not arrive whole")
        self._backend.recv(len(HELLO + LATER))
        self._half_close()
        self._stall_and_drain()
        self._close()

    def _take(self) -> None:
        fds = self._client_side.fileno(), self._backend_side.fileno()
        try:
            self._flow = self._handoff.take(Offer(*fds, self._on_over))
        except Refused as refusal:
            raise SelfTestFailed(f"refused: {refusal}") from None
        # the flow's now, to close
        self._client_side.detach()
        self._backend_side.detach()

    def _cut(self) -> None:
        if self._flow is not None and not self._over:
            self._flow.cut("self_test")
        self._loop.turn(0)

    def _on_over(self, _: Flow) -> None:
        self._over = True

    def _half_close(self) -> None:
        """
        A FIN alone, while the other direction has yet to begin.
        """
        self._client.shutdown(socket.SHUT_WR)
        self._wait(lambda: _peek(self._backend) == b"", "half-close: the end did not arrive")

    def _stall_and_drain(self) -> None:
        """
        From the backend to a client that does not read, then reads on.
        """
        pattern = os.urandom(PIECE)
        sent = self._send_until_stalled(pattern)
        if sent > BOUND:
            raise SelfTestFailed(f"bound: {sent} bytes under way to a reader that does not read")
        self._backend.shutdown(socket.SHUT_WR)
        got = 0

        def read() -> bool:
            nonlocal got
            for data in _received(self._client):
                if not data:
                    if got == sent:
                        return True
                    raise SelfTestFailed(f"half-close: overtook {sent - got} of {sent} bytes")
                start = got % PIECE
                expected = (pattern + pattern)[start : start + len(data)]
                if data != expected:
                    raise SelfTestFailed(f"hash: other bytes than were sent, after {got}")
                got += len(data)
            return False

        self._wait(read, "drain: a reader that read on did not get all bytes and the end")

    def _send_until_stalled(self, pattern: bytes) -> int:
        sent = 0
        came_on = time.monotonic()
        while sent < DATA and time.monotonic() - came_on < STALLED:
            try:
                # from where the pattern stopped, so that every byte's place is known
                start = sent % PIECE
                sent += self._backend.send(pattern[start:])
                came_on = time.monotonic()
            except BlockingIOError:
                pass
            self._loop.turn(0.001)
        return sent

    def _close(self) -> None:
        self._wait(lambda: self._over, "close: both sides ended, the connection did not")
        self._loop.turn(0)
        for end in (self._client, self._backend):
            if error := end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise SelfTestFailed(f"close: ended with {errno.errorcode[error]}")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        while not condition():
            if time.monotonic() > self._until:
                raise SelfTestFailed(what)
            self._loop.turn(0.001)


class _PacketTrial(_Trial):
    def __init__(self, loop: Loop, handoff: PacketHandoff, stack: contextlib.ExitStack) -> None:
        super().__init__(loop, handoff, stack)
        self._packet_handoff = handoff

    def run(self) -> None:
        handoff, packet = self._packet_handoff, self._packet_handoff.packet
        near, far = self._client_side, self._backend_side
        self._client.sendall(HELLO)
        self._wait(lambda: _peek(near) == HELLO, "hello")
        legs = [(end.getpeername(), end.getsockname()) for end in (near, far)]
        offer = Offer(near.fileno(), far.fileno(), self._on_over)
        (flow,) = handoff.install([offer], anywhere=True)
        if isinstance(flow, Exception):
            raise SelfTestFailed(f"refused: {flow}")
        self._flow = flow
        self._wait(lambda: _peek(self._backend) == HELLO, "the hello did not arrive")
        numbers = []
        silence(near.fileno(), far.fileno())
        for end in (near, far):
            numbers.append(sequence_numbers(end.fileno()))
            # the flow's now, to close
            end.detach()
        for here, there in ((0, 1), (1, 0)):
            sent, received = numbers[here]
            remote, local = legs[here]
            made = packet.translate(_segment(remote, local, received, sent))
            sent, received = numbers[there]
            remote, local = legs[there]
            if made != _segment(local, remote, sent, received, hops=HOPS - 1):
                raise SelfTestFailed(f"translation: {made.hex() if made else 'dropped'}")
        flow.cut("self_test")
        self._loop.turn(0)
        handoff.reap_now()
        for end in (self._client, self._backend):
            if error := end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise SelfTestFailed(f"silence: a socket ended with {errno.errorcode[error]}")
        if _peek(self._client) is not None:
            raise SelfTestFailed("silence: a socket said that it had ended")


def _segment(
    source: tuple[str, int], destination: tuple[str, int], seq: int, ack: int, *, hops: int = HOPS
) -> bytes:
    """
    Write a TCP segment with one byte, and no options.
    """
    (sender, port), (receiver, other_port) = (
        (socket.inet_aton(address), port) for address, port in (source, destination)
    )
    fields = (port, other_port, seq, ack, 5 << 4, 0x18, 0, 0, 0)
    segment = struct.pack("!HHIIBBHHH", *fields) + b"x"
    pseudo = sender + receiver + struct.pack("!II", TCP, len(segment))
    segment = segment[:16] + checksum(pseudo + segment).to_bytes(2) + segment[18:]
    header = bytearray(ip_header(sender, receiver, TCP, len(segment)))
    header[8] = hops
    header[10:12] = bytes(2)
    header[10:12] = checksum(bytes(header)).to_bytes(2)
    return bytes(header) + segment


def _peek(end: socket.socket) -> bytes | None:
    try:
        return end.recv(4096, socket.MSG_PEEK)
    except BlockingIOError:
        return None


def _received(end: socket.socket) -> Iterator[bytes]:
    while True:
        try:
            data = end.recv(PIECE)
        except BlockingIOError:
            return
        yield data
        if not data:
            return
