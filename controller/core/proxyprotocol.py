"""
The PROXY protocol header, versions 1 and 2 (HAProxy's proxy-protocol.txt of 2020-03-05).

Rules of this file:

1. A byte that has no place in a header is an error as soon as it is seen, so that waiting for more
   is always waiting for the rest of a header, and never for long.
2. A header of a TCP client is read strictly.  Any other (LOCAL, UNKNOWN, UDP, UNIX) is skipped by
   its length, unread: the protocol then has the connection's own addresses count.
3. An address has one form: what IPv6 only wraps (::ffff:192.0.2.1) is IPv4, and zones are dropped.
"""

import re
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final, Literal

import google_crc32c

Address = tuple[str, int]
Version = Literal["v1", "v2"]
_IP = IPv4Address | IPv6Address

MAX_HEADER: Final = 4096
"""
Longest header to wait for.  The protocol itself ends at 64 KiB, but wants a header to fit in one
segment; nginx reads no more than this either.
"""

_MAX_LINE: Final = 107
"""Longest line of version 1, with its end (section 2.1)."""

_MIN_LINE: Final = len(b"PROXY UNKNOWN\r\n")

_MAX_PORT: Final = 0xFFFF

_SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_LOCAL, _PROXY = 0x20, 0x21
_TCP4, _TCP6 = 0x11, 0x21
_ALPN, _AUTHORITY, _CRC32C = 1, 2, 3

_LINE_OPENINGS: Final = (b"PROXY TCP4 ", b"PROXY TCP6 ", b"PROXY UNKNOWN")
_OPENINGS: Final = (
    *_LINE_OPENINGS,
    _SIGNATURE + bytes((_LOCAL,)),  # of any family: a receiver has to ignore it
    *(
        _SIGNATURE + bytes((_PROXY, family << 4 | transport))
        for family in range(4)
        for transport in range(3)
    ),
)

_LINE: Final = re.compile(rb"PROXY (?:TCP4 [0-9. ]*|TCP6 [0-9A-Fa-f:. ]*|UNKNOWN(?: [^\r\n]*)?)")

_HEAD: Final = struct.Struct("!12sBBH")
_TLV: Final = struct.Struct("!BH")
_ADDRESSES: Final = {_TCP4: struct.Struct("!4s4sHH"), _TCP6: struct.Struct("!16s16sHH")}


class ProxyHeaderError(Exception):
    """
    These bytes are no PROXY header and can not become one; the connection must be dropped.
    """


@dataclass(frozen=True, slots=True)
class NeedMore:
    """
    Ask again when there are *at_least* bytes in all; no header ends before that.
    """

    at_least: int


@dataclass(frozen=True, slots=True)
class Header:
    """
    A PROXY header of *size* bytes.

    *source* and *destination* are the client's two addresses, None if those of the connection
    itself count; *authority* is the server name that the sender saw.
    """

    size: int
    source: Address | None = None
    destination: Address | None = None
    authority: str | None = None


def read_header(data: bytes) -> Header | NeedMore:
    """
    Read a header from the start of *data*, whatever follows it.

    Raises:
        ProxyHeaderError: *data* begins with no header.
    """
    if not data.startswith(_OPENINGS) and not any(o.startswith(data) for o in _OPENINGS):
        raise ProxyHeaderError(f"no PROXY header: {data[:16]!r}")
    return _read_v2(data) if data.startswith(b"\r") else _read_v1(data)


def write_header(
    version: Version, client: Address, local: Address, *, authority: str | None, alpn: bytes | None
) -> bytes:
    """
    Write the header that tells of *client*, which connected to *local*.

    Of two families, as HAProxy does it, the IPv4 address is wrapped in IPv6: UNKNOWN would lose the
    client, and is refused by some.  Version 2 also tells *authority*, the server name, and *alpn*,
    the name of one protocol; version 1 has no room for them.
    """
    source, destination = _read_ip(client[0]), _read_ip(local[0])
    if source.version != destination.version:
        source, destination = _wrap(source), _wrap(destination)
    if version == "v1":
        words = f"TCP{source.version} {_write_ip(source)} {_write_ip(destination)}"
        return f"PROXY {words} {client[1]} {local[1]}\r\n".encode()

    transport = _TCP4 if source.version == 4 else _TCP6  # noqa: PLR2004 - IPv4
    block = _ADDRESSES[transport].pack(source.packed, destination.packed, client[1], local[1])
    if alpn is not None:
        block += _TLV.pack(_ALPN, len(alpn)) + alpn
    if authority is not None:
        name = authority.encode()
        block += _TLV.pack(_AUTHORITY, len(name)) + name
    # the checksum is made over a header that has zeros in its place
    block += _TLV.pack(_CRC32C, 4)
    unsigned = _HEAD.pack(_SIGNATURE, _PROXY, transport, len(block) + 4) + block
    return unsigned + _checksum(unsigned + bytes(4))


def _read_v1(data: bytes) -> Header | NeedMore:
    if not data.startswith(_LINE_OPENINGS):
        return NeedMore(_MIN_LINE)
    line, end, _ = data[:_MAX_LINE].partition(b"\r\n")
    if not _LINE.fullmatch(line if end else line.removesuffix(b"\r")):
        raise ProxyHeaderError(f"bad PROXY line: {line!r}")
    if not end:
        if len(data) >= _MAX_LINE:
            raise ProxyHeaderError(f"PROXY line does not end: {line!r}")
        return NeedMore(max(len(data) + 1, _MIN_LINE))
    size = len(line) + len(end)
    if line.startswith(b"PROXY UNKNOWN"):
        return Header(size)
    ip = IPv4Address if line.startswith(b"PROXY TCP4") else IPv6Address
    try:
        _, _, source, destination, source_port, destination_port = line.decode().split(" ")
        return Header(
            size,
            (str(_unwrap(ip(source))), _read_port(source_port)),
            (str(_unwrap(ip(destination))), _read_port(destination_port)),
        )
    except ValueError as err:
        raise ProxyHeaderError(f"bad PROXY line: {line!r}: {err}") from None


def _read_port(text: str) -> int:
    port = int(text)
    if port > _MAX_PORT or text != str(port):
        raise ValueError(f"no port: {text!r}")
    return port


def _read_v2(data: bytes) -> Header | NeedMore:
    if len(data) < _HEAD.size:
        return NeedMore(_HEAD.size)
    _, command, transport, length = _HEAD.unpack_from(data)
    size = _HEAD.size + length
    if size > MAX_HEADER:
        raise ProxyHeaderError(f"PROXY header of {size} bytes, at most {MAX_HEADER} are read")
    addresses = _ADDRESSES.get(transport) if command == _PROXY else None
    if addresses is not None and length < addresses.size:
        raise ProxyHeaderError(f"PROXY header with {length} bytes of addresses")
    if len(data) < size:
        return NeedMore(size)
    if addresses is None:
        return Header(size)
    source, destination, source_port, destination_port = addresses.unpack_from(data, _HEAD.size)
    return Header(
        size,
        (str(_unwrap(ip_address(source))), source_port),
        (str(_unwrap(ip_address(destination))), destination_port),
        _read_authority(data[:size], _HEAD.size + addresses.size),
    )


def _read_authority(header: bytes, start: int) -> str | None:
    """
    Walk the TLVs of *header* from *start*; the checksum is over all of it.
    """
    authority = None
    while start < len(header):
        body = start + _TLV.size
        if body > len(header):
            raise ProxyHeaderError("PROXY header ends inside a TLV")
        kind, length = _TLV.unpack_from(header, start)
        start = body + length
        if start > len(header):
            raise ProxyHeaderError("PROXY header ends inside a TLV")
        value = header[body:start]
        if kind == _AUTHORITY:
            try:
                authority = value.decode()
            except UnicodeDecodeError:
                raise ProxyHeaderError(f"authority is not UTF-8: {value[:64]!r}") from None
        elif kind == _CRC32C and value != _checksum(header[:body] + bytes(length) + header[start:]):
            raise ProxyHeaderError("PROXY header has a wrong checksum")
    return authority


def _checksum(header: bytes) -> bytes:
    return int(google_crc32c.value(header)).to_bytes(4, "big")


def _read_ip(text: str) -> _IP:
    return _unwrap(ip_address(text.partition("%")[0]))


def _unwrap(ip: _IP) -> _IP:
    return ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip


def _write_ip(ip: _IP) -> str:
    # backends log what stands here, so let people read it: Python before 3.13 writes hexadecimal
    inner = ip.ipv4_mapped if isinstance(ip, IPv6Address) else None
    return str(ip) if inner is None else f"::ffff:{inner}"


def _wrap(ip: _IP) -> IPv6Address:
    return ip if isinstance(ip, IPv6Address) else IPv6Address(bytes(10) + b"\xff\xff" + ip.packed)
