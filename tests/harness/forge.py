"""
Packets on a connection's addresses that neither of its ends has sent.
"""

import json
import socket
import struct
from dataclasses import dataclass, replace
from typing import Self

from controller.core.packets import TCP, checksum, ip_header
from harness.machines import Here
from harness.sockets import numbers

FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16

_FRAGMENT_HEADER = 44
_MORE_FRAGMENTS = 0x2000
_ETH_P = {4: 0x0800, 6: 0x86DD}
_WINDOW = 1000

Endpoint = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Segment:
    """
    A TCP segment, from the one endpoint to the other.
    """

    source: Endpoint
    to: Endpoint
    seq: int
    ack: int
    flags: int = ACK
    payload: bytes = b""
    fragment: bool = False
    """Whether it says that more of it follows."""

    @classmethod
    def expected(cls, end: socket.socket) -> Self:
        """
        Make the segment without bytes that *end*, which is silent, would send next.
        """
        seq, ack = numbers(end)
        return cls(end.getsockname()[:2], end.getpeername()[:2], seq, ack)

    def but(self, *, flags: int = ACK, seq: int = 0, ack: int = 0, **fields: bytes | bool) -> Self:
        """
        Make another one of it, with *seq* and *ack* added to its numbers.
        """
        seq, ack = (self.seq + seq) % 2**32, (self.ack + ack) % 2**32
        return replace(self, flags=flags, seq=seq, ack=ack, **fields)

    @property
    def version(self) -> int:
        """
        Its IP version.
        """
        return 6 if ":" in self.source[0] else 4

    def packet(self) -> bytes:
        """
        Write it, as a packet with right checksums.
        """
        family = socket.AF_INET6 if self.version == 6 else socket.AF_INET
        source, to = (socket.inet_pton(family, address) for address, _ in (self.source, self.to))
        ports = self.source[1], self.to[1]
        fields = (*ports, self.seq, self.ack, 5 << 4, self.flags, _WINDOW, 0, 0)
        segment = struct.pack("!HHIIBBHHH", *fields) + self.payload
        pseudo = source + to + struct.pack("!II", len(segment), TCP)
        segment = segment[:16] + checksum(pseudo + segment).to_bytes(2) + segment[18:]
        if not self.fragment:
            return ip_header(source, to, TCP, len(segment)) + segment
        if self.version == 6:
            segment = struct.pack("!BBHI", TCP, 0, 1, 1) + segment
            return ip_header(source, to, _FRAGMENT_HEADER, len(segment)) + segment
        head = ip_header(source, to, TCP, len(segment))
        head = head[:6] + _MORE_FRAGMENTS.to_bytes(2) + head[8:10] + bytes(2) + head[12:]
        return head[:10] + checksum(head).to_bytes(2) + head[12:] + segment


def send(segment: Segment, machine: Here, device: str, to: Here, its_device: str) -> None:
    """
    Send *segment* by *device* of *machine* to *its_device* of the machine *to*, whoever it is from.
    """
    link = json.loads(to.run("ip", "-j", "link", "show", "dev", its_device))
    address = bytes.fromhex(link[0]["address"].replace(":", ""))
    with machine.network(), socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as sock:
        protocol = _ETH_P[segment.version]
        sock.sendto(segment.packet(), (device, protocol, 0, 0, address))
