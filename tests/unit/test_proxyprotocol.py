"""
PROXY headers are read as their specification has it, and written so that they are read back.
"""

import struct
from ipaddress import IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

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

SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")

WIDEST = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"

LINES = {
    # section 2.1: the example, and the four longest lines
    b"PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n": (
        ("192.168.0.1", 56324),
        ("192.168.0.11", 443),
    ),
    b"PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n": (
        ("255.255.255.255", 65535),
        ("255.255.255.255", 65535),
    ),
    f"PROXY TCP6 {WIDEST} {WIDEST} 65535 65535\r\n".encode(): ((WIDEST, 65535), (WIDEST, 65535)),
    b"PROXY UNKNOWN\r\n": (None, None),
    f"PROXY UNKNOWN {WIDEST} {WIDEST} 65535 65535\r\n".encode(): (None, None),
    # what it allows besides
    b"PROXY UNKNOWN \0 whatever\xff\r\n": (None, None),
    b"PROXY TCP6 2001:DB8::1 2001:db8:0:0:0:0:0:2 0 0\r\n": (
        ("2001:db8::1", 0),
        ("2001:db8::2", 0),
    ),
    b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:c633:6401 1 2\r\n": (
        ("192.0.2.1", 1),
        ("198.51.100.1", 2),
    ),
}


def binary(command: int, transport: int, block: bytes) -> bytes:
    return SIGNATURE + struct.pack("!BBH", command, transport, len(block)) + block


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


TCP4 = bytes((192, 0, 2, 1, 198, 51, 100, 1)) + struct.pack("!HH", 56324, 443)
TCP6 = (
    IPv6Address("2001:db8::1").packed
    + IPv6Address("2001:db8::2").packed
    + struct.pack("!HH", 56324, 443)
)
WRAPPED = bytes(10) + b"\xff\xff"

FOUR = (("192.0.2.1", 56324), ("198.51.100.1", 443))
SIX = (("2001:db8::1", 56324), ("2001:db8::2", 443))

BINARIES = {
    # section 2.2, "the following protocol bytes are expected"
    binary(0x20, 0x00, b""): (None, None),
    binary(0x21, 0x00, b""): (None, None),
    binary(0x21, 0x11, TCP4): FOUR,
    binary(0x21, 0x12, TCP4): (None, None),
    binary(0x21, 0x21, TCP6): SIX,
    binary(0x21, 0x22, TCP6): (None, None),
    binary(0x21, 0x31, bytes(216)): (None, None),
    binary(0x21, 0x32, bytes(216)): (None, None),
    # a receiver ignores the family of LOCAL, and skips what it does not know
    binary(0x20, 0xFF, b"anything"): (None, None),
    binary(0x20, 0x11, TCP4): (None, None),
    binary(0x21, 0x00, b"anything"): (None, None),
    binary(0x21, 0x10, b"anything"): (None, None),
    binary(0x21, 0x11, TCP4 + tlv(4, b"") + tlv(5, b"id") + tlv(0xEA, b"\1vpce")): FOUR,
    binary(0x21, 0x11, TCP4 + bytes(MAX_HEADER - 16 - 12)[:-3] + tlv(4, b"")): FOUR,
    binary(
        0x21,
        0x21,
        WRAPPED + bytes((192, 0, 2, 1)) + WRAPPED + bytes((198, 51, 100, 1)) + TCP6[-4:],
    ): FOUR,
}

RECORDED = bytes.fromhex("0d0a0d0a000d0a515549540a2111005a7f0000027f000001")

GOOD = LINES | BINARIES
TEXTS = [repr(data[:60]) for data in GOOD]


@pytest.mark.parametrize(("data", "addresses"), GOOD.items(), ids=TEXTS)
def test_reads_what_the_specification_shows(
    data: bytes, addresses: tuple[Address | None, Address | None]
) -> None:
    """
    Every kind of header is read, to its end and no further.
    """
    for tail in (b"", b"\r\n", b"\x16\x03\x01\x02\0\1", data):
        assert Header(len(data), *addresses) == read_header(data + tail)


@pytest.mark.parametrize("data", GOOD, ids=TEXTS)
def test_every_prefix_asks_for_more(data: bytes) -> None:
    """
    A cut-off header is never an error, and the answer makes progress without reading too far.
    """
    for cut in range(len(data)):
        need = read_header(data[:cut])

        assert isinstance(need, NeedMore)
        assert cut < need.at_least <= len(data)
