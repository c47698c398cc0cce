"""
Keep the packet programs on every device by which packets of others come and go.

That is every Ethernet device but those whose packets come by another one as well: ports of
bridges, of bonds, of virtual routers.  What has no Ethernet header (WireGuard, tun, PPP) is left
out; connections that come that way are not handed over as packets, since no SYN of theirs is seen.

A thread of its own: the list of devices takes the kernel milliseconds.
"""

import contextlib
import errno
import os
import select
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final

import structlog
from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl import RTMGRP_LINK

ETHERNET: Final = 1
"""ARPHRD_ETHER."""

LOOPBACK: Final = 8
"""IFF_LOOPBACK."""

SETTLE: Final = 0.02
"""Seconds that changes may go on before the devices are listed: a new container makes several."""

RELIST: Final = 30.0
"""Seconds between lists in any case, should the kernel have had no room to tell of a change."""

log = structlog.get_logger()


def list_devices(ip: IPRoute) -> frozenset[int]:
    """
    List the devices, by index, that the programs belong on.
    """
    return frozenset(
        link["index"]
        for link in ip.get_links()
        if link["ifi_type"] == ETHERNET
        and not link["flags"] & LOOPBACK
        and link.get("master") is None
    )


class Devices:
    """
    A thread that calls *follow* with the devices whenever they have changed.
    """

    def __init__(self, follow: Callable[[Iterable[int]], dict[int, str]]) -> None:
        """
        Call it for the first time, in this thread.

        Raises:
            OSError: the kernel does not tell of devices.
        """
        self._follow = follow
        self._refused: set[int] = set()
        self._wake, self._bell = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._news.setblocking(False)
        self._news.bind((0, RTMGRP_LINK))
        self._look()
        self._thread = threading.Thread(target=self._run, name="devices", daemon=True)

    def start(self) -> None:
        """
        Begin to follow changes.
        """
        self._thread.start()

    def stop(self) -> None:
        """
        End, and wait for it.
        """
        if self._bell >= 0:
            os.close(self._bell)
            self._bell = -1
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> None:
        try:
            with IPRoute(strict_check=True) as ip:
                devices = list_devices(ip)
        except NetlinkError as err:
            raise OSError(err.code, f"devices: {os.strerror(err.code)}") from err
        refused = self._follow(devices)
        for device in refused.keys() - self._refused:
            log.warning("device not followed", device=device, error=refused[device])
        self._refused = set(refused)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._news, select.POLLIN)
        while True:
            events: list[Any] = poll.poll(RELIST * 1000)
            if any(fd == self._wake for fd, _ in events):
                return
            while poll.poll(SETTLE * 1000) and self._drain():
                pass
            try:
                self._look()
            except OSError as err:
                log.warning("devices not listed", error=err.strerror)

    def _drain(self) -> bool:
        """
        Throw away what has been told, and tell whether there was anything.
        """
        heard = False
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    self._news.recv(65536)
                except OSError as err:
                    # too much to tell: the list has it all
                    if err.errno != errno.ENOBUFS:
                        raise
                heard = True
        return heard
