"""
Prove in a private network that a backend can be dialled from a foreign address.

`python -m controller.router.probe` builds a host and a container in network namespaces of its
own, lays the very same plumbing there, dials from a foreign address, and prints what came of it.
Nothing on the machine's own network is read or changed.  The namespaces end with the process, and
the process with its parent: nothing is left, however it ends.

A process of its own, because a user namespace, which stands in where CAP_SYS_ADMIN is missing, can
only be entered by a process with one thread.

Where namespaces are refused, as by Docker's default seccomp profile, nothing is proven; then the
first connections tell.  What the private network can not tell is what this host's own filters do.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Final

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from controller.core.clientip import MARK, MASK, PRIORITY, TABLE
from controller.router.plumbing import (
    EVERYTHING,
    FAMILIES,
    LOOPBACK,
    Plumbing,
    PlumbingError,
    ip_versions,
)

PATIENCE: Final = 3.0
"""Seconds for the whole probe; it takes 0.3, most of them to start Python, more on a busy host."""

REPLY: Final = 1.0
"""Seconds in which a reply comes back over a virtual cable, if it ever does."""

HOST: Final = {4: "192.0.2.1", 6: "2001:db8::1"}
CONTAINER: Final = {4: "192.0.2.2", 6: "2001:db8::2"}
LENGTH: Final = {4: 24, 6: 64}
CABLE: Final = "cable0"
CLIENT: Final = {4: "198.51.100.1", 6: "2001:db8:1::1"}

TRANSPARENT: Final = {4: (socket.SOL_IP, 19), 6: (socket.IPPROTO_IPV6, 75)}
"""IP_TRANSPARENT and IPV6_TRANSPARENT."""

_NODAD: Final = 0x02
_NEWUSER: Final = 0x10000000
_NEWNET: Final = 0x40000000
_PR_SET_PDEATHSIG: Final = 1
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """
    Whether transparency works here; None if that could not be told.  *reason* is for people.
    """

    ok: bool | None
    reason: str


def probe() -> ProbeResult:
    """
    Run the probe in a process of its own.
    """
    # -P: not what lies in the folder we happen to be in
    command = [sys.executable, "-P", "-m", "controller.router.probe"]
    try:
        done = subprocess.run(  # noqa: S603 - ourselves
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False
        )
        return ProbeResult(**json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        return ProbeResult(None, f"not proven: the probe took more than {PATIENCE} s")
    except (OSError, ValueError) as err:
        return ProbeResult(None, f"not proven: the probe did not answer: {err}")


def _probe() -> ProbeResult:
    try:
        host = _unshare(_NEWNET, _NEWUSER | _NEWNET)
        container = _unshare(_NEWNET)
        _enter(host)
        _plug(host, container)
        versions = ip_versions()
    except (OSError, NetlinkError) as err:
        return ProbeResult(None, f"not proven: no private network here: {err}")
    try:
        Plumbing(MARK, MASK, TABLE, PRIORITY).install()
        for version in versions:
            _dial(version, host, container)
    except (OSError, PlumbingError) as err:
        return ProbeResult(ok=False, reason=str(err))
    return ProbeResult(ok=True, reason=f"proven for {' and '.join(f'IPv{v}' for v in versions)}")


def _dial(version: int, host: int, container: int) -> None:
    family = FAMILIES[version]
    with _within(container, host):
        listener = socket.create_server((CONTAINER[version], 0), family=family)
    with listener, socket.socket(family) as ours:
        listener.settimeout(REPLY)
        ours.setsockopt(*TRANSPARENT[version], 1)
        ours.settimeout(REPLY)
        ours.bind((CLIENT[version], 0))
        try:
            ours.connect(listener.getsockname()[:2])
            theirs, seen = listener.accept()
        except TimeoutError:
            raise PlumbingError(f"IPv{version}: replies to the client do not come back") from None
        theirs.close()
        if seen[0] != CLIENT[version]:
            raise PlumbingError(f"IPv{version}: the backend saw {seen[0]} and not the client")


# --- private networks ---


def _unshare(*flags: int) -> int:
    """
    Enter a new network by the first of *flags* that is allowed.
    """
    if all(_LIBC.unshare(choice) for choice in flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "unshare")
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _enter(network: int) -> None:
    if _LIBC.setns(network, _NEWNET):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "setns")


@contextlib.contextmanager
def _within(network: int, home: int) -> Iterator[None]:
    _enter(network)
    try:
        yield
    finally:
        _enter(home)


def _plug(host: int, container: int) -> None:
    """
    Join *host*, where we are, and *container*, which leads all replies to it.
    """
    cable = {"kind": "veth", "ifname": CABLE, "peer": {"ifname": CABLE, "net_ns_fd": container}}
    with IPRoute() as outer, _within(container, host), IPRoute() as inner:
        outer.link("add", **cable)
        ends = ((outer, HOST), (inner, CONTAINER))
        # both ends before any address: IPv6 does nothing yet on a cable with one end
        for ip, _ in ends:
            for index in (LOOPBACK, *ip.link_lookup(ifname=CABLE)):
                ip.link("set", index=index, state="up")
        for version in ip_versions():
            for ip, addresses in ends:
                _address(ip, addresses[version], LENGTH[version])
            default = {"family": FAMILIES[version], "dst": EVERYTHING[version]}
            inner.route("add", gateway=HOST[version], **default)
            if version == 6:  # noqa: PLR2004 - IPv6
                # who looks for a neighbour in the name of a foreign address asks from this one
                _address(outer, "fe80::1", LENGTH[version])


def _address(ip: IPRoute, address: str, length: int) -> None:
    (index,) = ip.link_lookup(ifname=CABLE)
    # no duplicate can be there, and to look for one takes a second
    ip.addr("add", index=index, address=address, prefixlen=length, flags=_NODAD)


def main() -> None:
    """
    Print a ProbeResult as JSON.
    """
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    print(json.dumps(asdict(_probe())))


if __name__ == "__main__":
    main()
