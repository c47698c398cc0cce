"""
Write the few packets that the router sends in the name of others.

They are a TCP reset, and the ICMP error that tells a sender of a smaller MTU.  Addresses are
packed, 4 bytes of IPv4 or 16 of IPv6; an endpoint is an address and a port.
"""

import struct

Endpoint = tuple[bytes, int]

HOPS = 64
"""Hop limit and TTL of new packets (RFC 1700)."""

TCP = 6
ICMP = 1
ICMPV6 = 58

_RST_ACK = 0x14
_IPV4_SIZE = 4
_DONT_FRAGMENT = 0x4000


def checksum(data: bytes) -> int:
    """
    Compute the Internet checksum of *data* (RFC 1071).
    """
    words = struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2))
    total: int = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ip_header(source: bytes, destination: bytes, protocol: int, size: int) -> bytes:
    """
    Write the IP header of a packet with *size* bytes behind it (RFC 791, 3.1; RFC 8200, 3).
    """
    if len(source) == _IPV4_SIZE:
        fields = (0x45, 0, 20 + size, 0, _DONT_FRAGMENT, HOPS, protocol, 0)
        head = struct.pack("!BBHHHBBH", *fields) + source + destination
        return head[:10] + checksum(head).to_bytes(2) + head[12:]
    return struct.pack("!IHBB", 6 << 28, size, protocol, HOPS) + source + destination


def _pseudo_header(source: bytes, destination: bytes, protocol: int, size: int) -> bytes:
    return source + destination + struct.pack("!II", size, protocol)


def tcp_reset(source: Endpoint, destination: Endpoint, seq: int, ack: int) -> bytes:
    """
    Write a RST from *source* to *destination* (RFC 9293, 3.5.2).

    It is taken for one only with the *seq* that is expected next (RFC 5961, 3.2).
    """
    fields = (source[1], destination[1], seq, ack, 5 << 4, _RST_ACK, 0, 0, 0)
    segment = struct.pack("!HHIIBBHHH", *fields)
    pseudo = _pseudo_header(source[0], destination[0], TCP, len(segment))
    segment = segment[:16] + checksum(pseudo + segment).to_bytes(2) + segment[18:]
    return ip_header(source[0], destination[0], TCP, len(segment)) + segment


def packet_too_big(source: Endpoint, destination: Endpoint, seq: int, mtu: int) -> bytes:
    """
    Tell *source* that what it sent to *destination*, a segment at *seq*, is larger than *mtu*.

    The error comes from *destination* (RFC 1191, 4; RFC 8201, 4).
    """
    (sender, port), (receiver, other_port) = source, destination
    segment = struct.pack("!HHI", port, other_port, seq)
    # of the packet, of which no more is known, only that it was larger
    inner = ip_header(sender, receiver, TCP, mtu) + segment
    if len(sender) == _IPV4_SIZE:
        body = struct.pack("!BBHHH", 3, 4, 0, 0, mtu) + inner
        body = body[:2] + checksum(body).to_bytes(2) + body[4:]
        return ip_header(receiver, sender, ICMP, len(body)) + body
    # RFC 4443, 2.3: with the pseudo header
    body = struct.pack("!BBHI", 2, 0, 0, mtu) + inner + bytes(12)
    pseudo = _pseudo_header(receiver, sender, ICMPV6, len(body))
    body = body[:2] + checksum(pseudo + body).to_bytes(2) + body[4:]
    return ip_header(receiver, sender, ICMPV6, len(body)) + body
