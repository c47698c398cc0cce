"""
The ports that backends are dialled from, where the router has to choose them itself.

A flow whose sockets are gone still has its addresses, of which the kernel knows nothing: it could
give the same port to another connection.  So ports are taken from a range that the kernel gives
to no one who does not ask for it, and none that a flow to the same backend has.
"""

import itertools
from functools import lru_cache
from pathlib import Path
from typing import Final

FIRST: Final = 10240
"""Below are the ports of services."""

ENOUGH: Final = 4096
"""Ports that a range must have, all of which may be in use towards one backend."""

TRIES: Final = 256

_RANGE: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_MAPPED: Final = bytes(10) + b"\xff\xff"
_IPV4_SIZE: Final = 4


def choose_range(kernel: tuple[int, int]) -> range:
    """
    Choose from what *kernel*, the first and last port of its own range, leaves.
    """
    first, last = kernel
    if first - FIRST >= ENOUGH:
        return range(FIRST, first)
    if 65535 - last >= ENOUGH:
        return range(last + 1, 65536)
    return range(first, last + 1)


def find_range() -> tuple[range, bool]:
    """
    Find the ports to choose from, and whether the kernel gives them to no one who does not ask.
    """
    try:
        first, last = map(int, _RANGE.read_text().split())
    except (OSError, ValueError):
        first, last = 32768, 60999
    ours = choose_range((first, last))
    return ours, ours.start > last or ours.stop <= first


class Ports:
    """
    The addresses of all flows, and what may be used beside them.

    An entry is the router's address and the backend's, with ports, as in a `struct tuple`.
    """

    def __init__(self, half: int = 0, worker: int = 0, workers: int = 1) -> None:
        """
        Choose among the ports of one of several *workers*, of a router that has this *half*.

        Nobody knows the flows of another, so what each chooses from is its own; the halves are for
        a router and the one that takes its place.
        """
        ours, self.are_apart = find_range()
        self._cycle = itertools.cycle(ours[half::2][worker::workers])
        self._busy: dict[bytes, int] = {}

    def take(self, entry: bytes) -> None:
        """
        Take note of a flow's addresses.
        """
        busy = self._busy
        # without the router's own address too, which is not known before a connect
        for key in (entry, entry[16:]):
            busy[key] = busy.get(key, 0) + 1

    def give_back(self, entry: bytes) -> None:
        """
        Take note that a flow is over.
        """
        busy = self._busy
        for key in (entry, entry[16:]):
            if busy[key] > 1:
                busy[key] -= 1
            else:
                del busy[key]

    def choose(self, backend: tuple[bytes, int]) -> int:
        """
        Choose a port to dial *backend* from; 0 if none is found.
        """
        address, remote = _mapped(backend[0]), backend[1].to_bytes(2)
        for port in itertools.islice(self._cycle, TRIES):
            if address + port.to_bytes(2) + remote not in self._busy:
                return port
        return 0

    def is_free(self, client: tuple[bytes, int], backend: tuple[bytes, int]) -> bool:
        """
        Whether *backend* may be dialled from the address and the port of *client*.
        """
        addresses = _mapped(client[0]) + _mapped(backend[0])
        return addresses + client[1].to_bytes(2) + backend[1].to_bytes(2) not in self._busy


@lru_cache(4096)
def _mapped(address: bytes) -> bytes:
    return _MAPPED + address if len(address) == _IPV4_SIZE else address
