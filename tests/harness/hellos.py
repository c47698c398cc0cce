"""
ClientHellos to test with: real ones, the same cut up in other ways, and bad ones made of them.

Nothing here is shared with the product: `independent_server_name` is a second opinion, and the
builder takes hellos apart by itself.
"""

import json
import random
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "hellos"

ALERT, HANDSHAKE, APPLICATION_DATA = 21, 22, 23
CLIENT_HELLO, SERVER_HELLO = 1, 2
SERVER_NAME, PADDING = 0, 21
MAX_RECORD = 2**14


@dataclass(frozen=True, slots=True)
class Hello:
    """
    The first flight of a client, to be routed by *server_name*.
    """

    name: str
    data: bytes
    server_name: str
    alpn: tuple[bytes, ...] = ()
    ech: bool = False


@dataclass(frozen=True, slots=True)
class BadHello:
    """
    A first flight that is refused: counted as *result*, answered with *alert* or without a word.

    *ends* says that the client shuts its side after it.
    """

    name: str
    data: bytes
    result: str
    alert: int | None
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Parts:
    """
    A ClientHello message: all before the extensions, and they, in order.
    """

    head: bytes
    extensions: tuple[tuple[int, bytes], ...]

    def with_body(self, kind: int, body: bytes) -> "Parts":
        """
        Put *body* into the extension *kind*, which is added if missing.
        """
        if all(k != kind for k, _ in self.extensions):
            return replace(self, extensions=(*self.extensions, (kind, body)))
        changed = tuple((k, body if k == kind else b) for k, b in self.extensions)
        return replace(self, extensions=changed)

    def without(self, kind: int) -> "Parts":
        """
        Leave out the extension *kind*.
        """
        return replace(self, extensions=tuple(e for e in self.extensions if e[0] != kind))

    def message(self) -> bytes:
        """
        Write the handshake message.
        """
        extensions = b"".join(struct.pack("!H", k) + vector(b) for k, b in self.extensions)
        return message(CLIENT_HELLO, self.head + vector(extensions))

    def data(self) -> bytes:
        """
        Write the message in as few records as hold it, as a client would.
        """
        whole = self.message()
        return as_records(whole, range(MAX_RECORD, len(whole), MAX_RECORD))


# --- writing ---


def vector(body: bytes, size: int = 2) -> bytes:
    """
    Put the length before *body*, in *size* bytes.
    """
    return len(body).to_bytes(size, "big") + body


def message(kind: int, body: bytes) -> bytes:
    """
    Write a handshake message.
    """
    return bytes((kind,)) + vector(body, 3)


def record(body: bytes, kind: int = HANDSHAKE, version: int = 0x0301) -> bytes:
    """
    Write one TLS record.
    """
    return struct.pack("!BH", kind, version) + vector(body)


def as_records(payload: bytes, cuts: Iterable[int]) -> bytes:
    """
    Write *payload* as handshake records that end at *cuts*.
    """
    edges = [0, *cuts, len(payload)]
    return b"".join(record(payload[a:b]) for a, b in pairwise(edges))


def server_name(*names: bytes, kind: int = 0) -> bytes:
    """
    Write the body of a server_name extension.
    """
    return vector(b"".join(bytes((kind,)) + vector(name) for name in names))


# --- reading ---


def payload(data: bytes) -> bytes:
    """
    Join what is in the records of *data*.
    """
    joined = bytearray()
    while data:
        size = int.from_bytes(data[3:5], "big")
        joined += data[5 : 5 + size]
        data = data[5 + size :]
    return bytes(joined)


def take_apart(data: bytes) -> Parts:
    """
    Take a good hello apart.
    """
    body = payload(data)[4:]
    at = 34
    at += 1 + body[at]  # session_id
    at += 2 + int.from_bytes(body[at : at + 2], "big")  # cipher_suites
    at += 1 + body[at]  # compression_methods
    return Parts(body[:at], tuple(_extensions(body[at + 2 :])))


def _extensions(rest: bytes) -> Iterator[tuple[int, bytes]]:
    while rest:
        kind, size = struct.unpack_from("!HH", rest)
        yield kind, rest[4 : 4 + size]
        rest = rest[4 + size :]


class _Odd(Exception):  # noqa: N818 - never leaves this file
    pass


class _Reader:
    # takes from the front of bytes, and says so when there are too few

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def take(self, size: int) -> bytes:
        if size > len(self.rest):
            raise _Odd
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size: int) -> bytes:
        return self.take(self.number(size))


def independent_server_name(data: bytes) -> str | None:
    """
    Find the server name in *data*, by RFC 8446, section 4.1.2, and RFC 6066, section 3.

    Returns:
        The name in lower case and without its trailing dot; None when *data* does not start with
        one whole, well-formed ClientHello that has exactly one name.
    """
    try:
        return _server_name(_Reader(_hello_body(_Reader(data))))
    except _Odd:
        return None


def _hello_body(records: _Reader) -> bytes:
    joined = b""
    while len(joined) < 4 or len(joined) < 4 + int.from_bytes(joined[1:4], "big"):
        kind, major, _minor = records.take(3)
        fragment = records.vector(2)
        if kind != HANDSHAKE or major != 3 or len(fragment) > MAX_RECORD:
            raise _Odd
        joined += fragment
        if joined and joined[0] != CLIENT_HELLO:
            raise _Odd
    # what follows the hello, and how many records are empty, is for the backend to judge
    return joined[4 : 4 + int.from_bytes(joined[1:4], "big")]


def _server_name(hello: _Reader) -> str:
    hello.take(2 + 32)  # legacy_version, random
    session, _suites, _compressions = hello.vector(1), hello.vector(2), hello.vector(1)
    extensions = _Reader(hello.vector(2))
    if hello.rest or len(session) > 32:
        raise _Odd
    bodies = []
    while extensions.rest:
        kind, body = extensions.number(2), extensions.vector(2)
        if kind == SERVER_NAME:
            bodies.append(body)
    if len(bodies) != 1:
        raise _Odd
    body_reader = _Reader(bodies[0])
    names = _Reader(body_reader.vector(2))
    kind, name = names.number(1), names.vector(2)
    if kind != 0 or names.rest or body_reader.rest or not name or not name.isascii():
        raise _Odd
    return name.decode().lower().removesuffix(".")


# --- the sets ---


def good() -> list[Hello]:
    """
    Load the recorded hellos.
    """
    return [
        Hello(
            take["name"],
            (FOLDER / f"{take['name']}.bin").read_bytes(),
            take["server_name"],
            tuple(protocol.encode() for protocol in take["alpn"]),
            take["ech"],
        )
        for take in json.loads((FOLDER / "manifest.json").read_text())
    ]


def _base() -> Parts:
    return take_apart((FOLDER / "openssl-3.0-tls13-alpn.bin").read_bytes())


def odd() -> list[Hello]:
    """
    Make hellos that no client is known to send, but that are right all the same.
    """
    parts = _base().with_body(SERVER_NAME, server_name(b"app.example.com"))
    whole = parts.message()
    middle = whole.index(b"app.example.com") + 5
    odds = {
        "upper-case name": parts.with_body(SERVER_NAME, server_name(b"APP.Example.COM")).data(),
        "trailing dot": parts.with_body(SERVER_NAME, server_name(b"app.example.com.")).data(),
        "no other extension": Parts(parts.head, ())
        .with_body(SERVER_NAME, server_name(b"app.example.com"))
        .data(),
        "60 KiB of padding": parts.with_body(PADDING, bytes(60 * 1024)).data(),
        "empty handshake records between": (
            record(whole[:middle]) + 20 * record(b"") + record(whole[middle:])
        ),
        "cut in the handshake header": as_records(whole, [2]),
        "cut in the name": as_records(whole, [middle]),
        "one-byte records": as_records(whole, range(1, len(whole))),
        "records of two versions": (
            record(whole[:middle]) + record(whole[middle:], version=0x0303)
        ),
        "more behind the hello": parts.data() + record(b"early", APPLICATION_DATA),
    }
    # RFC 8446, section 5.1: the version of a record is to be ignored
    for version in (0x0300, 0x0302, 0x0303, 0x0304, 0x03FF):
        odds[f"record version {version:#06x}"] = record(whole, version=version)
    for version in (0x0300, 0x0301, 0x0304, 0xFFFF):
        changed = whole[:4] + version.to_bytes(2, "big") + whole[6:]
        odds[f"hello version {version:#06x}"] = record(changed)
    return [Hello(name, data, "app.example.com") for name, data in odds.items()]


NOT_TLS = {
    "http request": b"GET / HTTP/1.1\r\nHost: app.example.com\r\n\r\n",
    "http proxy request": b"CONNECT app.example.com:443 HTTP/1.1\r\n\r\n",
    "ssh banner": b"SSH-2.0-OpenSSH_9.2\r\n",
    "random bytes": random.Random(1).randbytes(400),  # noqa: S311 - the same in every run
    "zeros": bytes(400),
    "heartbeat": record(b"\1\0\0", 24),
    "unknown record type": record(b"\1\0\0", 99),
}

NO_HELLO = {
    "alert first": (record(b"\1\0", ALERT), 10),
    "fatal alert first": (record(b"\2\50", ALERT), 10),
    "change_cipher_spec first": (record(b"\1", 20), 10),
    "application data first": (record(b"GET / HTTP/1.1", APPLICATION_DATA), 10),
    "hello_request first": (record(message(0, b"")), 10),
}

BAD_NAMES = {
    "empty name": b"",
    "NUL in the name": b"app.example.com\0.example.org",
    "IPv4 address": b"192.0.2.1",
    "IPv4 address as one number": b"3221225985",
    "IPv6 address": b"2001:db8::1",
    "name with a port": b"app.example.com:443",
    "label of 64 bytes": b"a" * 64 + b".example.com",
    "label of 256 bytes": b"a" * 256,
    "name of 254 bytes": b".".join([b"a" * 63] * 3 + [b"a" * 50, b"example.com"])[-254:],
    "empty label": b"app..example.com",
    "two trailing dots": b"app.example.com..",
    "leading dot": b".example.com",
    "only a dot": b".",
    "wildcard": b"*.example.com",
    "catch-all": b"*",
    "blank in the name": b"app example.com",
    "line break in the name": b"app.example.com\r\n",
    "UTF-8 in the name": "b\u00fccher.example.com".encode(),
    "letter that lower-cases to ASCII": "app.example.\u212aom".encode(),
}


def bad() -> list[BadHello]:
    """
    Make the hellos that must not be routed; what is refused by OpenSSL gets the alert it gives.
    """
    parts = _base().with_body(SERVER_NAME, server_name(b"app.example.com"))
    whole = parts.message()
    name = server_name(b"app.example.com")
    good_hello = record(whole)
    middle = len(whole) // 2
    room = len(parts.with_body(PADDING, b"").message()) - len(parts.head) - 6
    padded = parts.with_body(PADDING, bytes(12 * 1024)).message()

    invalid = {label: (first + good_hello, alert) for label, (first, alert) in NO_HELLO.items()} | {
        "record over 16 KiB": (record(whole + bytes(MAX_RECORD)), 22),
        "record one byte over 16 KiB": (record(whole + bytes(MAX_RECORD + 1 - len(whole))), 22),
        "server_hello": (record(message(SERVER_HELLO, whole[4:])), 10),
        "alert in the middle": (
            record(whole[:middle]) + record(b"\1\0", ALERT) + record(whole[middle:]),
            10,
        ),
        "33 empty records": (33 * record(b"") + good_hello, 10),
        "handshake length of 16 MiB": (record(b"\1\xff\xff\xff" + whole[4:]), 47),
        "hello of no length": (record(message(CLIENT_HELLO, b"")), 50),
        "handshake length too small": (record(message(CLIENT_HELLO, whole[4:-10])), 50),
        "bytes behind the extensions": (record(message(CLIENT_HELLO, whole[4:] + b"x")), 50),
        "session_id of 33 bytes": (
            record(message(CLIENT_HELLO, parts.head[:34] + vector(bytes(33), 1) + whole[71:])),
            50,
        ),
        "extensions longer than the hello": (
            record(message(CLIENT_HELLO, parts.head + b"\xff\xff" + vector(name))),
            50,
        ),
        "extension longer than the extensions": (
            record(message(CLIENT_HELLO, parts.head + vector(b"\0\0\0\xff" + name))),
            50,
        ),
        "two server_name extensions": (
            replace(parts, extensions=(*parts.extensions, (SERVER_NAME, name))).data(),
            47,
        ),
    }
    bodies = {
        "empty server_name extension": b"",
        "empty server_name list": vector(b""),
        "two names": server_name(b"app.example.com", b"b.example.com"),
        "unknown type of name": server_name(b"app.example.com", kind=1),
        "server_name list too long": b"\0\xff" + name[2:],
        "server_name list too short": b"\0\x05" + name[2:],
        "host_name longer than its list": name[:3] + b"\0\xff" + name[5:],
        "host_name shorter than its list": name[:3] + b"\0\x05" + name[5:],
        "server_name cut off": name[:4],
    }
    named = {
        label: parts.with_body(SERVER_NAME, server_name(odd_name)).data()
        for label, odd_name in BAD_NAMES.items()
    }
    nameless = {
        "no server_name": parts.without(SERVER_NAME).data(),
        "no extensions": record(message(CLIENT_HELLO, parts.head)),
    }
    large = {
        "hello over 64 KiB": parts.with_body(PADDING, bytes(65535 - room)).data(),
        "hello of 12 KiB in 64 KiB of records": as_records(padded, range(1, len(padded))),
    }
    versions = {
        f"record version {version:#06x}": record(whole, version=version)
        for version in (0x0000, 0x0200, 0x0401)
    }
    return [
        *(BadHello(label, data, "not_tls", None) for label, data in NOT_TLS.items()),
        *(BadHello(label, data, "not_tls", None) for label, data in versions.items()),
        *(BadHello(label, data, "hello_invalid", code) for label, (data, code) in invalid.items()),
        *(
            BadHello(label, parts.with_body(SERVER_NAME, body).data(), "hello_invalid", 50)
            for label, body in bodies.items()
        ),
        *(BadHello(label, data, "bad_name", 112) for label, data in named.items()),
        *(BadHello(label, data, "no_sni", 112) for label, data in nameless.items()),
        *(BadHello(label, data, "hello_too_large", 47) for label, data in large.items()),
        BadHello("SSLv2 hello", _sslv2_hello(), "not_tls", None),
        BadHello("half a hello, then silence", good_hello[:middle], "hello_timeout", 40),
        BadHello("half a hello, then FIN", good_hello[:middle], "client_closed", 50, ends=True),
    ]


def _sslv2_hello() -> bytes:
    # RFC 5246, appendix E.2: a TLS hello in the clothes of SSL 2.0, which has no extensions
    body = b"\1\3\1" + struct.pack("!HHH", 3, 0, 16) + b"\0\0\x2f" + bytes(range(16))
    return struct.pack("!H", 0x8000 | len(body)) + body
