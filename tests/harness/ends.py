"""
Both ends of a connection through the product, in one test's hands.
"""

import contextlib
import hashlib
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Self

from harness.loopback import LOOPBACK, Address
from harness.tools import HarnessError


def client_hello(name: str) -> bytes:
    """
    Make a hello as OpenSSL says it to *name*.
    """
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    # the least that it offers is the distribution's choice else
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    talk = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        talk.do_handshake()
    return outgoing.read()


NAME: Final = "app.example.com"

HELLO: Final = client_hello(NAME)

PATIENCE: Final = 60
"""Seconds that an end waits for bytes, or to be rid of them."""

PIECE: Final = 1024 * 1024


class Backend:
    """
    A listening backend that hands out what it accepts.
    """

    def __init__(self, address: str = LOOPBACK, port: int = 0, hello: bytes = HELLO) -> None:
        self._hello = hello
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, port), family=family, backlog=1024)
        self._listener.settimeout(PATIENCE)
        self.address: Address = self._listener.getsockname()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def accept(self, hello: bytes = b"") -> socket.socket:
        """
        Take the next connection, which must begin with *hello*, or with the usual one.
        """
        hello = hello or self._hello
        end = self.take()
        if (got := read_exactly(end, len(hello))) != hello:
            raise HarnessError(f"no hello at the backend but {got[:64]!r}")
        return end

    def take(self) -> socket.socket:
        """
        Take the next connection, whatever it begins with, and whenever.
        """
        end, _ = self._listener.accept()
        end.settimeout(PATIENCE)
        return end


@contextmanager
def connection(router: Address, backend: Backend) -> Iterator[tuple[socket.socket, socket.socket]]:
    """
    Open a connection through *router*: its client's end and its backend's end.
    """
    with dial(router) as client, backend.accept() as end:
        yield client, end


def dial(router: Address, hello: bytes = HELLO) -> socket.socket:
    """
    Connect and send *hello*.
    """
    client = socket.create_connection(router, timeout=PATIENCE)
    client.sendall(hello)
    return client


def read_exactly(end: socket.socket, size: int) -> bytes:
    """
    Read *size* bytes, fewer only at the end.
    """
    got = bytearray()
    while len(got) < size and (data := end.recv(size - len(got))):
        got += data
    return bytes(got)


def read_all(end: socket.socket) -> bytes:
    """
    Read up to the end.
    """
    return b"".join(iter(lambda: end.recv(PIECE), b""))


def reset(end: socket.socket) -> None:
    """
    Close *end* with a RST.
    """
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()


def ended_by_reset(end: socket.socket) -> bool:
    """
    Wait for the end, and tell whether it was a RST.
    """
    try:
        while end.recv(PIECE):
            pass
    except ConnectionResetError:
        return True
    return False


@dataclass
class Sender:
    """
    A thread that sends *size* bytes into *end*, at most *rate* bytes a second, then a FIN.
    """

    end: socket.socket
    size: int
    block: bytes
    rate: int | None = None
    sent: int = 0
    digest: str = ""
    _thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if self.rate:
            # 47: SO_MAX_PACING_RATE (asm-generic/socket.h): TCP spaces its segments by itself
            self.end.setsockopt(socket.SOL_SOCKET, 47, self.rate)
        digest = hashlib.sha256()
        try:
            while self.sent < self.size:
                # from where the last send stopped: the stream is the block, over and over
                start = self.sent % len(self.block)
                data = memoryview(self.block)[start : start + self.size - self.sent]
                count = self.end.send(data)
                digest.update(data[:count])
                self.sent += count
            self.end.shutdown(socket.SHUT_WR)
        except OSError:
            return
        self.digest = digest.hexdigest()

    def join(self) -> str:
        """
        Wait for the end; return the SHA-256 of what was sent.
        """
        self._thread.join(PATIENCE)
        if not self.digest:
            raise HarnessError(f"sent only {self.sent} of {self.size} bytes")
        return self.digest


def receive_digest(end: socket.socket) -> tuple[int, str]:
    """
    Read up to the end: how many bytes, and their SHA-256.
    """
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(PIECE)
    while count := end.recv_into(buffer):
        digest.update(memoryview(buffer)[:count])
        size += count
    return size, digest.hexdigest()
