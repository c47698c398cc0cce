"""
Packets written in the name of others have the numbers, addresses and checksums that they need.
"""

import socket
import struct

import pytest

from controller.core.packets import checksum, packet_too_big, tcp_reset

V4 = (socket.inet_aton("192.0.2.1"), 443), (socket.inet_aton("198.51.100.2"), 50000)
V6 = (
    (socket.inet_pton(socket.AF_INET6, "2001:db8::1"), 443),
    (socket.inet_pton(socket.AF_INET6, "2001:db8::2"), 50000),
)


def split(packet: bytes) -> tuple[int, bytes, bytes, bytes]:
    """
    Take an IP packet apart: protocol, source, destination, and what is behind the header.
    """
    if packet[0] >> 4 == 4:
        assert 0 == checksum(packet[:20])
        assert len(packet) == int.from_bytes(packet[2:4])
        return packet[9], packet[12:16], packet[16:20], packet[20:]
    assert len(packet) - 40 == int.from_bytes(packet[4:6])
    return packet[6], packet[8:24], packet[24:40], packet[40:]


def test_checksum() -> None:
    """
    The example of RFC 1071, section 3, and one byte more.
    """
    data = bytes.fromhex("0001f203f4f5f6f7")

    assert 0xDDF2 ^ 0xFFFF == checksum(data)
    assert checksum(data + b"\x12\x00") == checksum(data + b"\x12")


@pytest.mark.parametrize(("source", "destination"), [V4, V6], ids=["IPv4", "IPv6"])
def test_a_reset(source: tuple[bytes, int], destination: tuple[bytes, int]) -> None:
    """
    A RST goes from the one to the other, with the numbers given, and no data.
    """
    packet = tcp_reset(source, destination, 0xFFFFFFFF, 7)
    protocol, sender, receiver, segment = split(packet)
    pseudo = sender + receiver + struct.pack("!II", len(segment), protocol)

    assert (socket.IPPROTO_TCP, source[0], destination[0]) == (protocol, sender, receiver)
    assert (source[1], destination[1], 0xFFFFFFFF, 7, 0x50, 0x14) == struct.unpack(
        "!HHIIBB", segment[:14]
    )
    assert 0 == checksum(pseudo + segment)


def test_too_big_for_ipv4() -> None:
    """
    The sender is told the MTU, and of which of its packets: RFC 1191 and RFC 792.
    """
    sender, receiver = V4
    protocol, source, destination, body = split(packet_too_big(sender, receiver, 99, 1300))
    inner = body[8:]

    assert (socket.IPPROTO_ICMP, receiver[0], sender[0]) == (protocol, source, destination)
    assert (3, 4, 0, 1300) == struct.unpack("!BBxxHH", body[:8])
    assert 0 == checksum(body)
    assert (sender[0], receiver[0]) == (inner[12:16], inner[16:20])
    assert (sender[1], receiver[1], 99) == struct.unpack("!HHI", inner[20:])


def test_too_big_for_ipv6() -> None:
    """
    The same by RFC 4443, whose checksum covers the addresses too.
    """
    sender, receiver = V6
    protocol, source, destination, body = split(packet_too_big(sender, receiver, 99, 1300))
    inner, pseudo = body[8:], source + destination + struct.pack("!II", len(body), protocol)

    assert (socket.IPPROTO_ICMPV6, receiver[0], sender[0]) == (protocol, source, destination)
    assert (2, 0, 1300) == struct.unpack("!BBxxI", body[:8])
    assert 0 == checksum(pseudo + body)
    assert (sender[0], receiver[0]) == (inner[8:24], inner[24:40])
    assert (sender[1], receiver[1], 99) == struct.unpack("!HHI", inner[40:48])
