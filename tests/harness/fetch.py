"""
Clients that fetch a page by name: Python, curl, and Go's TLS.

All of them check the certificate against the CA of the one container that should answer, so an
answer proves that nobody terminated TLS on the way.
"""

import os
import socket
import ssl
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import NamedTemporaryFile

from harness.machines import Machine
from harness.tools import CACHE, VENV, find_program, locked, run

TIMEOUT = 10


@dataclass(frozen=True, slots=True)
class Answer:
    """
    What an app says of itself and of the request.
    """

    app: str
    host: str
    protocol: str
    address: str


class RefusedError(OSError):
    """
    The client got no page; the message is what it said.
    """


Endpoint = tuple[str, int]
"""An address and a port."""

Client = Callable[[Machine, Endpoint, str, str], Answer]
"""Fetch from a machine: where to connect to, the name to ask for, the CA to trust."""


def connect(machine: Machine, at: Endpoint, name: str, root: str) -> ssl.SSLSocket:
    """
    Open a TLS connection from *machine* to *at*, asking for *name*.

    Raises:
        ssl.SSLError: The other side sent an alert, or is not who it should be.
        OSError: No connection.
    """
    with machine.network():
        sock = socket.create_connection(at, timeout=TIMEOUT)
    try:
        context = ssl.create_default_context(cadata=root)
        return context.wrap_socket(sock, server_hostname=name)
    except BaseException:
        sock.close()
        raise


def get(sock: ssl.SSLSocket, name: str, path: str = "/") -> bytes:
    """
    Ask for *path* on an open connection and return the body.

    Raises:
        OSError: The connection broke, or the answer is not a good one.
    """
    ask(sock, name, path)
    return read_body(sock)


def ask(sock: ssl.SSLSocket, name: str, path: str = "/") -> None:
    """
    Ask for *path* on an open connection.
    """
    sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())


def read_body(sock: ssl.SSLSocket) -> bytes:
    """
    Read one answer, and return its body.

    Raises:
        OSError: The connection broke, or the answer is not a good one.
    """
    data = bytearray()
    while (end := data.find(b"\r\n\r\n")) == -1:
        data += _some(sock)
    head = data[:end].decode().lower().split("\r\n")
    if head[0] != "http/1.1 200 ok":
        raise OSError(f"answered {head[0]!r}")
    length = next(int(line.split(":")[1]) for line in head if line.startswith("content-length:"))
    body = data[end + 4 :]
    while len(body) < length:
        body += _some(sock)
    return bytes(body)


def _some(sock: ssl.SSLSocket) -> bytes:
    data = sock.recv(65536)
    if not data:
        raise ConnectionResetError("ended in the middle of an answer")
    return data


def fetch(machine: Machine, at: Endpoint, name: str, root: str) -> Answer:
    """
    Fetch with Python's TLS, HTTP/1.1.
    """
    try:
        with connect(machine, at, name, root) as sock:
            return Answer(*get(sock, name).decode().split())
    except OSError as err:
        raise RefusedError(str(err)) from err


def _program(machine: Machine, *command: str | Path) -> Answer:
    done = subprocess.run(
        machine.outside(*command), capture_output=True, text=True, timeout=30, check=False
    )
    if done.returncode:
        raise RefusedError(done.stderr.strip())
    return Answer(*done.stdout.split())


def _curl(option: str) -> Client:
    def fetch_with_curl(machine: Machine, at: Endpoint, name: str, root: str) -> Answer:
        curl = find_program("curl", "curl")
        with NamedTemporaryFile("w", suffix=".pem") as ca:
            ca.write(root)
            ca.flush()
            options = ("-sS", option, "--max-time", str(TIMEOUT), "--cacert", ca.name)
            address, port = at
            where = ("--resolve", f"{name}:{port}:{address}", f"https://{name}:{port}/")
            return _program(machine, curl, *options, *where)

    return fetch_with_curl


def _go(option: str) -> Client:
    def fetch_with_go(machine: Machine, at: Endpoint, name: str, root: str) -> Answer:
        with NamedTemporaryFile("w", suffix=".pem") as ca:
            ca.write(root)
            ca.flush()
            return _program(machine, _go_client(), option, *map(str, at), name, ca.name)

    return fetch_with_go


@cache
def _go_client() -> Path:
    source = Path(__file__).with_name("client.go")
    client = CACHE / "go-client"
    with locked("go-client"):
        if not client.exists() or client.stat().st_mtime < source.stat().st_mtime:
            environment = os.environ | {
                "CGO_ENABLED": "0",
                "GOCACHE": str(CACHE / "go-build"),
                "GOTOOLCHAIN": "local",
            }
            run(VENV / "bin/go", "build", "-o", client, source, timeout=280, env=environment)
    return client


CLIENTS: dict[str, tuple[Client, str]] = {
    "curl-http1": (_curl("--http1.1"), "HTTP/1.1"),
    "curl-h2": (_curl("--http2"), "HTTP/2.0"),
    "go-http1": (_go("http/1.1"), "HTTP/1.1"),
    "go-h2": (_go("h2"), "HTTP/2.0"),
}
"""Every client, and the protocol that it speaks."""
