"""
What the kernel tells of a connection, and what may be asked of it that Python has no name for.
"""

import ctypes
import errno
import fcntl
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from harness.machines import Here

_TCP_REPAIR = 19
_TCP_REPAIR_QUEUE = 20
_TCP_QUEUE_SEQ = 21
_RECV_QUEUE, _SEND_QUEUE = 1, 2
_REPAIR_OFF = -1
"""Without a packet to the other end."""

_SIOCETHTOOL = 0x8946
_IFNAMSIZ = 16

# linux/ethtool.h
OFFLOADS = {
    "receive checksums": 0x15,
    "send checksums": 0x17,
    "scatter-gather": 0x19,
    "TSO": 0x1F,
    "GSO": 0x24,
    "GRO": 0x2C,
}
"""How each is set, in the order in which they may be switched off."""


@dataclass(frozen=True, slots=True)
class Info:
    """
    TCP_INFO, as much as is asked for here.
    """

    pmtu: int
    total_retrans: int


def info(sock: socket.socket) -> Info:
    """
    Ask TCP how *sock* fares.
    """
    data = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    # linux/tcp.h: eight small fields, then words
    words = struct.unpack_from("=24I", data, 8)
    return Info(pmtu=words[13], total_retrans=words[23])


def vanish(sock: socket.socket) -> None:
    """
    Close *sock* without a word to its other end, as a machine does that loses its power.
    """
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
    sock.close()


def numbers(sock: socket.socket) -> tuple[int, int]:
    """
    Read the sequence numbers of the next byte that *sock* will send, and of that it waits for.
    """
    found = []
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
    for queue in (_SEND_QUEUE, _RECV_QUEUE):
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_QUEUE, queue)
        found.append(sock.getsockopt(socket.IPPROTO_TCP, _TCP_QUEUE_SEQ) % 2**32)
    sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_OFF)
    return found[0], found[1]


def counts(machine: Here, *names: str) -> dict[str, int]:
    """
    Read counts of the kernel's, by the names that nstat has for them, of *machine*.
    """
    found: dict[str, int] = {}
    for path in ("/proc/net/snmp", "/proc/net/netstat"):
        lines = iter(machine.run("cat", path).splitlines())
        for heads in lines:
            kind, *fields = heads.split()
            values = next(lines).split()[1:]
            for field, value in zip(fields, values, strict=True):
                found[kind.removesuffix(":") + field] = int(value)
    for line in machine.run("cat", "/proc/net/snmp6").splitlines():
        field, value = line.split()
        found[field] = int(value)
    return {name: found[name] for name in names}


def switch_offloads_off(machine: Here, device: str) -> None:
    """
    Have *device* of *machine* take and give packets as they are on a wire.
    """
    with machine.network(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for command in OFFLOADS.values():
            value = ctypes.create_string_buffer(struct.pack("=II", command, 0))
            name = device.encode().ljust(_IFNAMSIZ, b"\0")
            request = struct.pack("16sP16x", name, ctypes.addressof(value))
            try:
                fcntl.ioctl(sock, _SIOCETHTOOL, request)
            except OSError as err:
                # a bridge has no receive checksums of its own to leave to a device
                if err.errno != errno.EOPNOTSUPP:
                    raise


def devices(machine: Here) -> Iterator[str]:
    """
    List the Ethernet devices of *machine*.
    """
    for line in machine.run("ip", "-o", "link").splitlines():
        name = line.split(": ")[1].split("@")[0]
        if "link/ether" in line:
            yield name
