"""
A tunnel between two machines, whose packets have no Ethernet header, like those of WireGuard.
"""

import contextlib
import fcntl
import os
import select
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from harness.machines import Here

DEVICE = "tun0"

# linux/if_tun.h
_TUNSETIFF = 0x400454CA
_IFF_TUN = 1
_IFF_NO_PI = 0x1000


@contextmanager
def tunnel(one: Here, other: Here) -> Iterator[None]:
    """
    Carry packets between DEVICE of *one* and DEVICE of *other*.
    """
    with contextlib.ExitStack() as undo:
        ends = [_open(machine, undo) for machine in (one, other)]
        wake, bell = os.pipe()
        undo.callback(os.close, wake)
        carrier = threading.Thread(target=_carry, args=(ends, wake), name="tunnel")
        carrier.start()
        undo.callback(carrier.join)
        undo.callback(os.close, bell)
        yield


def _open(machine: Here, undo: contextlib.ExitStack) -> int:
    with machine.network():
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    undo.callback(os.close, fd)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    machine.run("ip", "link", "set", DEVICE, "up")
    return fd


def _carry(ends: list[int], wake: int) -> None:
    while True:
        ready, _, _ = select.select((*ends, wake), (), ())
        if wake in ready:
            return
        for fd in ready:
            packet = os.read(fd, 65536)
            # the other end is not up yet
            with contextlib.suppress(OSError):
                os.write(ends[fd == ends[0]], packet)
