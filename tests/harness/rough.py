"""
A stretch of Ethernet that loses TCP's packets, lets them overtake each other, and doubles them.

It is a machine between two others with a process that carries each frame from one device to the
other: this module, run as a program.  What it meets must be as it is on a wire, so the machines
beside it have their offloads switched off.
"""

import heapq
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from harness.machines import Here

DEVICES = ("near0", "far0")

_ETH_P_ALL = 0x0003
_SOL_PACKET = 263
_PACKET_IGNORE_OUTGOING = 23
_SO_RCVBUFFORCE = 33
_QUEUE = 64 * 1024 * 1024
"""Bytes of frames that may wait: this process is slower than a wire, but loses no more."""

_ECN, _CE = 3, 3


@dataclass(frozen=True, slots=True)
class Weather:
    """
    The shares of TCP's packets, each way, that something happens to.

    Those that are *late* are overtaken by others; *marked* is for congestion, where the ends can
    hear of it.
    """

    lost: float = 0
    late: float = 0
    double: float = 0
    marked: float = 0


BAD = Weather(lost=0.02, late=0.02, double=0.01)


@contextmanager
def carrying(machine: Here, weather: Weather) -> Iterator[None]:
    """
    Carry frames between DEVICES of *machine* meanwhile.
    """
    shares = (weather.lost, weather.late, weather.double, weather.marked)
    command = (sys.executable, "-m", "harness.rough", *map(str, shares))
    with subprocess.Popen(
        machine.outside(*command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    ) as process:
        try:
            assert process.stdout.readline() == b"ready\n"
            yield
        finally:
            process.stdin.close()


def _is_tcp(frame: bytearray) -> bool:
    kind = frame[12:14]
    return (kind == b"\x08\x00" and frame[23] == socket.IPPROTO_TCP) or (
        kind == b"\x86\xdd" and frame[20] == socket.IPPROTO_TCP
    )


def _mark(frame: bytearray) -> None:
    """
    Have *frame* say that it met congestion, if its sender can hear of that (RFC 3168).
    """
    if frame[12:14] == b"\x86\xdd":
        if frame[15] & (_ECN << 4):
            frame[15] |= _CE << 4
    elif frame[15] & _ECN:
        was = frame[15]
        frame[15] |= _CE
        # RFC 1624: the header's checksum, by what has changed
        total = (~int.from_bytes(frame[24:26], "big") & 0xFFFF) + (~was & 0xFFFF) + frame[15]
        total = (total & 0xFFFF) + (total >> 16)
        total = (total & 0xFFFF) + (total >> 16)
        frame[24:26] = (~total & 0xFFFF).to_bytes(2, "big")


class _Stretch:
    """
    What lies between DEVICES.
    """

    def __init__(self, weather: Weather) -> None:
        self._weather = weather
        self._chance = random.Random(1)  # noqa: S311 - noise
        self._order = count()
        self._late: list[tuple[float, int, socket.socket, bytearray]] = []
        near, far = map(_open, DEVICES)
        self._across = {near: far, far: near}

    def carry(self) -> None:
        """
        Carry frames until stdin ends.
        """
        while True:
            wait = max(0, self._late[0][0] - time.monotonic()) if self._late else None
            ready, _, _ = select.select([*self._across, 0], [], [], wait)
            if 0 in ready:
                return
            for sock in ready:
                # both ways in turn, whatever one of them has waiting
                for _ in range(64):
                    try:
                        self._take(bytearray(sock.recv(65536)), self._across[sock])
                    except BlockingIOError:
                        break
            while self._late and self._late[0][0] <= time.monotonic():
                _, _, to, frame = heapq.heappop(self._late)
                to.send(frame)

    def _take(self, frame: bytearray, to: socket.socket) -> None:
        if not _is_tcp(frame):
            to.send(frame)
            return
        if self._happens(self._weather.lost):
            return
        if self._happens(self._weather.marked):
            _mark(frame)
        if self._happens(self._weather.late):
            when = time.monotonic() + self._chance.uniform(0.001, 0.01)
            heapq.heappush(self._late, (when, next(self._order), to, frame))
            return
        for _ in range(2 if self._happens(self._weather.double) else 1):
            to.send(frame)

    def _happens(self, share: float) -> bool:
        return self._chance.random() < share


def _open(device: str) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL))
    sock.bind((device, 0))
    sock.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
    sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _QUEUE)
    sock.setblocking(False)
    return sock


if __name__ == "__main__":
    stretch = _Stretch(Weather(*map(float, sys.argv[1:])))
    print("ready", flush=True)
    stretch.carry()
