"""
PROXY headers are read as their specification has it, and written so that they are read back.
"""

import struct
from ipaddress import IPv4Address, IPv6Address

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
    # TLVs that say nothing here, up to the longest header
    binary(0x21, 0x11, TCP4 + tlv(4, b"") + tlv(0xEA, b"\1vpce") + tlv(5, b"")): FOUR,
    binary(0x21, 0x11, TCP4 + tlv(4, bytes(MAX_HEADER - 16 - 12 - 3))): FOUR,
    # IPv4 that is only wrapped
    binary(
        0x21,
        0x21,
        WRAPPED + bytes((192, 0, 2, 1)) + WRAPPED + bytes((198, 51, 100, 1)) + TCP6[-4:],
    ): FOUR,
}

RECORDED = bytes.fromhex(
    "0d0a0d0a000d0a515549540a211100747f0000017f000001e8f2a96f030004160bfa9b010002683202000f6170702e"
    "6578616d706c652e636f6d0500002000440100000000210007544c5376312e33250005454332353624001165636473"
    "612d776974682d534841323536230016544c535f4145535f3235365f47434d5f534841333834"
)
"""What HAProxy 2.6 wrote for a client on loopback that asked app.example.com for h2."""

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


def test_reads_what_haproxy_wrote() -> None:
    """
    A recorded header gives the addresses and the name, and its checksum is found right.
    """
    client, local = ("127.0.0.1", 59634), ("127.0.0.1", 43375)

    assert Header(len(RECORDED), client, local, "app.example.com") == read_header(RECORDED)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16",
        b"G",
        b"p",
        b"PA",
        b"PROXY\t",
        b"PROXY  ",
        b"PROXY TCP5",
        b"PROXY TCP4 x",
        b"PROXY TCP4 192.0.2.1\n",
        b"PROXY TCP4 192.0.2.1\r\r",
        b"PROXY TCP6 g",
        b"PROXY TCP6 fe80::1%",
        b"PROXY UNKNOWNX",
        b"PROXY UNKNOWN\n",
        b"PROXY UNKNOWN x\rx",
        b"PROXY UNKNOWN " + b"x" * 93,
        SIGNATURE[:4] + b"\1",
        SIGNATURE[:-1] + b"\r",
        SIGNATURE + b"\x11",
        SIGNATURE + b"\x22",
        SIGNATURE + b"\x21\x41",
        SIGNATURE + b"\x21\x13",
        SIGNATURE + b"\x21\x11\0\x0b",
        SIGNATURE + b"\x21\x21\0\x23",
        SIGNATURE + b"\x20\0\x0f\xf1",
        SIGNATURE + b"\x21\x11\xff\xff",
    ],
)
def test_a_byte_that_has_no_place_is_an_error_at_once(data: bytes) -> None:
    """
    Up to its last byte this could become a header; with it, nobody waits any longer.
    """
    assert isinstance(read_header(data[:-1]), NeedMore)
    with pytest.raises(ProxyHeaderError):
        read_header(data)


@pytest.mark.parametrize(
    "words",
    [
        "TCP4 192.0.2.1 198.51.100.1 56324",
        "TCP4 192.0.2.1 198.51.100.1 56324 443 ",
        "TCP4 192.0.2.1 198.51.100.1 56324 443 1",
        "TCP4 192.0.2.1  198.51.100.1 56324 443",
        "TCP4  192.0.2.1 198.51.100.1 56324 443",
        "TCP4 192.0.2.1 198.51.100.1 65536 443",
        "TCP4 192.0.2.1 198.51.100.1 056324 443",
        "TCP4 192.0.2.1 198.51.100.1 00 443",
        "TCP4 192.0.2.1 198.51.100.1 56324 4.3",
        "TCP4 192.0.2.01 198.51.100.1 56324 443",
        "TCP4 192.0.2.256 198.51.100.1 56324 443",
        "TCP4 192.0.2 198.51.100.1 56324 443",
        "TCP4 3221225985 198.51.100.1 56324 443",
        "TCP4     ",
        "UNKNOWN\r",
        "TCP6 192.0.2.1 198.51.100.1 56324 443",
        "TCP6 2001:db8::1 2001:db8::2 56324 bad",
        "TCP6 2001:db8::1::1 2001:db8::2 56324 443",
        "TCP6 2001:db8:1 2001:db8::2 56324 443",
        "TCP6 2001:db8::00001 2001:db8::2 56324 443",
    ],
)
def test_refuses_a_line_that_is_not_exactly_right(words: str) -> None:
    """
    A line of the right letters that is not the one way to write two addresses is refused.
    """
    with pytest.raises(ProxyHeaderError):
        read_header(f"PROXY {words}\r\n".encode())


@pytest.mark.parametrize(
    "tlvs",
    [
        b"\4",
        b"\4\0",
        b"\4\0\1",
        tlv(4, b"") + b"\0",
        tlv(2, b"\xff"),
        tlv(3, b""),
        tlv(3, bytes(3)),
        tlv(3, bytes(4)),
        tlv(3, bytes(5)),
    ],
)
def test_refuses_tlvs_that_are_not_right(tlvs: bytes) -> None:
    """
    A TLV that is cut off, a name that is no UTF-8, and a checksum that is no checksum are refused.
    """
    data = binary(0x21, 0x11, TCP4 + tlvs)

    assert NeedMore(len(data)) == read_header(data[:-1])
    with pytest.raises(ProxyHeaderError):
        read_header(data)


@pytest.mark.parametrize("at", [*range(16, 28), *range(31, 35)])
def test_a_wrong_bit_is_noticed(at: int) -> None:
    """
    No bit of the addresses or of the checksum itself can turn over unseen.
    """
    for bit in range(8):
        wrong = bytearray(RECORDED)
        wrong[at] ^= 1 << bit

        with pytest.raises(ProxyHeaderError):
            read_header(bytes(wrong))


def test_writes_the_line_that_people_expect() -> None:
    """
    Version 1 is this text: backends log it as it is, so wrapped addresses stay legible.
    """
    line = b"PROXY TCP4 192.0.2.1 198.51.100.1 56324 443\r\n"
    mixed = b"PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 56324 443\r\n"

    assert line == write_header("v1", *FOUR, authority="app.example.com", alpn=b"h2")
    assert mixed == write_header("v1", FOUR[0], SIX[1], authority=None, alpn=None)


def test_writes_version_2_to_the_letter() -> None:
    """
    Version 2 is addresses, protocol, name and a checksum, in this order.
    """
    block = TCP4 + tlv(1, b"h2") + tlv(2, b"app.example.com") + tlv(3, bytes(4))

    written = write_header("v2", *FOUR, authority="app.example.com", alpn=b"h2")

    assert binary(0x21, 0x11, block)[:-4] == written[:-4]
    assert Header(len(written), *FOUR, "app.example.com") == read_header(written)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_writes_an_address_in_its_one_form(version: Version) -> None:
    """
    A zone means nothing on another host, and wrapped IPv4 is IPv4.
    """
    zoned = write_header(version, ("fe80::1%eth0", 1), SIX[1], authority=None, alpn=None)
    wrapped = write_header(version, ("::ffff:192.0.2.1", 56324), FOUR[1], authority=None, alpn=None)

    assert Header(len(zoned), ("fe80::1", 1), SIX[1]) == read_header(zoned)
    assert write_header(version, *FOUR, authority=None, alpn=None) == wrapped


IP = IPv4Address | IPv6Address

ips = st.ip_addresses() | st.builds(
    lambda ip: IPv6Address(WRAPPED + ip.packed), st.ip_addresses(v=4)
)
ports = st.integers(0, 0xFFFF)


@given(
    st.sampled_from(("v1", "v2")),
    st.tuples(ips, ips),
    st.tuples(ports, ports),
    st.none() | st.text(max_size=253),
    st.none() | st.binary(min_size=1, max_size=255),
)
def test_reads_back_what_it_wrote(
    version: Version,
    ends: tuple[IP, IP],
    ports: tuple[int, int],
    authority: str | None,
    alpn: bytes | None,
) -> None:
    """
    Any two addresses, of any families, and any name come back as they were.
    """
    client, local = ((str(ip), port) for ip, port in zip(ends, ports, strict=True))

    data = write_header(version, client, local, authority=authority, alpn=alpn)

    plain = [str((ip.version == 6 and ip.ipv4_mapped) or ip) for ip in ends]
    source, destination = zip(plain, ports, strict=True)
    name = authority if version == "v2" else None
    assert Header(len(data), source, destination, name) == read_header(data)


def outcome(data: bytes) -> Header | NeedMore | None:
    try:
        return read_header(data)
    except ProxyHeaderError:
        return None


SHORT = [data for data in (*GOOD, RECORDED) if len(data) < MAX_HEADER]
changes = st.lists(
    st.tuples(st.integers(0, 250), st.integers(0, 3), st.binary(max_size=4)), max_size=4
)


@given(st.sampled_from(SHORT), changes)
def test_a_mutant_is_one_thing_however_it_is_cut(
    good: bytes, edits: list[tuple[int, int, bytes]]
) -> None:
    """
    Whatever is done to a header, more is asked for until it is a header or an error, for good.
    """
    mutant = bytearray(good)
    for at, removed, put in edits:
        mutant[at % len(good) : at % len(good) + removed] = put
    last: Header | NeedMore | None = NeedMore(0)
    for cut in range(len(mutant) + 1):
        found = outcome(bytes(mutant[:cut]))

        if isinstance(last, NeedMore):
            assert not isinstance(found, Header) or last.at_least <= found.size == cut
            assert not isinstance(found, NeedMore) or last.at_least <= found.at_least > cut
        else:
            assert last == found
        last = found


@given(st.binary(max_size=200), st.sampled_from((b"", b"PROXY ", b"PROXY TCP6 ", SIGNATURE)))
def test_any_bytes_are_a_header_or_an_error(data: bytes, opening: bytes) -> None:
    """
    No bytes can do more than be refused.
    """
    found = outcome(opening + data)

    assert not isinstance(found, Header) or found.size <= len(opening + data)
    assert not isinstance(found, NeedMore) or len(opening + data) < found.at_least <= MAX_HEADER
