"""
A host with a container bridge and Docker's kind of filters, without an engine.

The world, one machine, reaches the host from CLIENT; its own address is EDGE, from where trusted
proxies of ours speak.  Containers are machines on the host's bridge.
"""

import contextlib
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from harness import ends
from harness.machines import CLIENT_ADDRESS, HOST_ADDRESS, Here, Machine, join
from harness.product import Sniroute
from harness.tools import wait_for

CLIENT = {4: "198.51.100.7", 6: "2001:db8:0:7::7"}
EDGE = CLIENT_ADDRESS
FRONT = {4: HOST_ADDRESS, 6: "2001:db8:0:9::1"}

FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}

ANYWHERE = 8443
"""A port on which the product listens on every address, beside its front."""

PATIENCE = 10.0

LATE = 3.0
"""Seconds that a client may wait because its address did not work: `--transparent-timeout`."""

PROMPT = 2.5
"""Seconds in which a connection is answered when nothing is waited for."""


def gateway(version: int, bridge: int = 1) -> str:
    """
    The host's own address on one of its bridges.
    """
    return {4: f"198.18.{bridge}.1", 6: f"2001:db8:0:{bridge}::1"}[version]


_FILTERS = """
table inet filter {
    chain through { type filter hook forward priority filter; policy drop;
        ct state established,related accept;
    }
    chain in { type filter hook input priority filter; policy drop;
        iifname "lo" accept;
        ct state established,related accept;
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept;
        tcp dport { 443, 8443, 9443 } accept;
    }
}
"""

_BRIDGE_FILTERS = """
table ip nat {
    chain post { type nat hook postrouting priority srcnat; }
}
table ip6 nat {
    chain post { type nat hook postrouting priority srcnat; }
}
table inet raw {
    chain pre { type filter hook prerouting priority raw; }
}
add rule ip nat post ip saddr 198.18.N.0/24 oifname != "brN" masquerade
add rule ip6 nat post ip6 saddr 2001:db8:0:N::/64 oifname != "brN" masquerade
add rule inet raw pre iifname != "brN" ip daddr 198.18.N.0/24 drop
add rule inet raw pre iifname != "brN" ip6 daddr 2001:db8:0:N::/64 drop
add rule inet filter through iifname "brN" oifname != "br*" accept
"""
"""What Docker adds for each network; N is its number."""


@dataclass(frozen=True, slots=True)
class Answer:
    """
    The address and port that a backend saw, those of the client, and how long it took.
    """

    seen: tuple[str, int]
    client: tuple[str, int]
    seconds: float


class RefusedError(OSError):
    """
    The client got no answer: an alert, whose number this is, or none (0).
    """


class Container(Machine):
    """
    A machine on a bridge of *lab*, with the addresses that end in *number*.
    """

    def __init__(self, lab: "Lab", number: int, bridge: int) -> None:
        super().__init__(lab.share)
        self.address = {v: gateway(v, bridge)[:-1] + str(number) for v in (4, 6)}
        port = f"port{number}"
        peer = ("peer", "name", "eth0", "netns", str(self.pid))
        lab.host.run("ip", "link", "add", port, "master", f"br{bridge}", "type", "veth", *peer)
        lab.host.run("ip", "link", "set", port, "up")
        _furnish(self, "eth0", self.address)
        for version in self.address:
            via = ("via", gateway(version, bridge))
            self.run("ip", f"-{version}", "route", "add", "default", *via)


class Lab:
    """
    The world, the host and, as they are asked for, containers.
    """

    front = (FRONT[4], 443)

    def __init__(self) -> None:
        with contextlib.ExitStack() as undo:
            self.share = Path(tempfile.mkdtemp(prefix="sniroute-"))
            undo.callback(shutil.rmtree, self.share)
            self.world, self.host = (undo.enter_context(Machine(self.share)) for _ in range(2))
            for kind in ("ipv4", "ipv6"):
                self.host.run("sysctl", "-qw", f"net.{kind}.conf.all.forwarding=1")
            # addresses are there at once, so that no route comes while a test compares them
            self.host.run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
            join(self.host, self.world)
            self.check_sources(1)
            _furnish(self.host, "out0", {6: FRONT[6]})
            neighbour = {4: EDGE, 6: "2001:db8:0:9::2"}
            _furnish(self.world, "eth0", {6: neighbour[6]})
            for version, address in CLIENT.items():
                ip = ("ip", f"-{version}")
                extra = ("nodad",) if version == 6 else ()
                self.world.run(*ip, "addr", "add", address, "dev", "lo", *extra)
                self.world.run(*ip, "route", "add", FRONT[version], "dev", "eth0", "src", address)
                self.host.run(*ip, "route", "add", address, "via", neighbour[version])
            self.filters(_FILTERS)
            self.bridge(1)
            self._undo = undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """
        Switch all of it off.
        """
        self._undo.close()

    def filters(self, text: str) -> None:
        """
        Load nftables rules on the host.
        """
        self.host.run("sh", "-c", f"nft -f - <<'EOF'\n{text}\nEOF")

    def bridge(self, number: int) -> None:
        """
        Set up one more bridge, as an engine does.
        """
        self.host.run("ip", "link", "add", f"br{number}", "type", "bridge")
        _furnish(self.host, f"br{number}", {v: gateway(v, number) for v in (4, 6)})
        self.filters(_BRIDGE_FILTERS.replace("N", str(number)))

    def container(self, number: int, bridge: int = 1) -> Container:
        """
        Plug in one more, with a number of its own.
        """
        return self._undo.enter_context(Container(self, number, bridge))

    def witness(self, container: Container, port: int = 443) -> None:
        """
        Have *container* tell whoever connects whom it sees.
        """
        self._undo.enter_context(_witness(container, port))

    def check_sources(self, rp_filter: int) -> None:
        """
        Set how the host checks the source of what it receives, on every interface.
        """
        conf = "/proc/sys/net/ipv4/conf"
        # the kernel takes the larger one of `all` and the interface's own
        self.host.run("sh", "-c", f"for f in {conf}/*/rp_filter; do echo {rp_filter} >$f; done")

    def state(self) -> list[str]:
        """
        All filters, rules and routes of the host.
        """
        return [
            self.host.run(*command.split())
            for command in (
                "nft list ruleset",
                "ip -4 rule",
                "ip -6 rule",
                "ip -4 route show table all",
                "ip -6 route show table all",
            )
        ]

    def product(self, *flags: str, routes: str) -> Sniroute:
        """
        Run the product on the host with the routes file *routes*; it serves them on return.
        """
        file = self.share / "routes.toml"
        file.write_text(routes)
        listen = ("--listen", f"[{FRONT[6]}]:443", "--listen", f":{ANYWHERE}")
        options = ("--engine", "none", "--routes", str(file), "--drain", "1")
        # longer than a busy machine takes for a prompt answer, so that the two can be told apart
        patience = ("--transparent-timeout", str(LATE))
        sniroute = Sniroute(self, *listen, *patience, *options, *flags)
        wait_for("routes", sniroute.routes)
        return sniroute

    def ask(
        self,
        name: str,
        version: int = 4,
        *,
        machine: Here | None = None,
        source: tuple[str, int] | None = None,
        port: int = 443,
        before: bytes = b"",
    ) -> Answer:
        """
        Connect to the product from *machine*, by default the world, and hear whom *name* sees.

        Raises:
            RefusedError: There was no answer.
        """
        began = time.monotonic()
        with (machine or self.world).network():
            sock = socket.create_connection((FRONT[version], port), PATIENCE, source)
        with sock:
            sock.sendall(before + ends.client_hello(name))
            client = sock.getsockname()[:2]
            said = ends.read_all(sock)
        if said[:1] in (b"", b"\x15"):
            raise RefusedError(said[-1] if said else 0)
        address, number = said.decode().split()
        return Answer((address, int(number)), client, time.monotonic() - began)


def route(host: str, address: str, port: int = 443, **keys: str) -> str:
    """
    Write one route of a routes file; of *keys* an underscore is a dash.
    """
    backend = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    more = "".join(f'{key.replace("_", "-")} = "{value}"\n' for key, value in keys.items())
    return f'[[route]]\nhost = ["{host}"]\nbackends = ["{backend}"]\n{more}\n'


def access_line(sniroute: Sniroute, client: tuple[str, int], **fields: Any) -> dict[str, Any]:
    """
    Wait for the line in the product's log of the connection from *client*, which has ended.

    Where a port may have been used twice, *fields* of the line tell which.
    """
    wanted = {"event": "connection", "client": client[0], "client_port": client[1], **fields}

    def line() -> dict[str, Any] | None:
        return next(
            (x for x in sniroute.log() if all(x.get(k) == v for k, v in wanted.items())), None
        )

    return wait_for(f"{wanted} in the log", line)


def _furnish(machine: Here, device: str, addresses: dict[int, str]) -> None:
    machine.run("ip", "link", "set", device, "up")
    for version, address in addresses.items():
        extra, length = (("nodad",), 64) if version == 6 else ((), 24)
        machine.run("ip", "addr", "add", f"{address}/{length}", "dev", device, *extra)


@contextmanager
def _witness(container: Container, port: int) -> Iterator[None]:
    listeners = []
    for version, address in container.address.items():
        with container.network():
            listeners.append(socket.create_server((address, port), family=FAMILY[version]))
    for listener in listeners:
        threading.Thread(target=_tell, args=(listener,), daemon=True).start()
    try:
        yield
    finally:
        for listener in listeners:
            # close() alone leaves a thread in accept()
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()


def _tell(listener: socket.socket) -> None:
    while True:
        try:
            connection, peer = listener.accept()
        except OSError:
            return
        # a client that gives up early is its own test's concern
        with connection, contextlib.suppress(OSError):
            connection.settimeout(PATIENCE)
            connection.recv(65536)
            connection.sendall("{} {}".format(*peer[:2]).encode())
