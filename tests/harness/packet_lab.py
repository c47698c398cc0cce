"""
A lab whose host hands connections over as packets, and connections through it.
"""

import json
import socket
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, Self

import pytest

from controller.core.routes import RouteTable
from controller.core.wire import dump_table, read_routes
from harness import loopback, operate, rough
from harness.ends import HELLO, NAME, Backend, client_hello, read_exactly
from harness.lab import CLIENT, EDGE, FRONT, Container, Lab, access_line, route
from harness.loopback import Address, Product
from harness.machines import Here, Machine
from harness.product import Sniroute
from harness.promises import Promises
from harness.rough import Weather
from harness.sockets import switch_offloads_off
from harness.tools import HarnessError, run, wait_for
from harness.transfer_promises import BLOCK

HANDOFF = "packet"

ACTIVE = "sniroute_connections_active"
"""The metric of connections under way."""

PATIENCE = 20
"""Seconds that an end of a connection waits: longer than TCP takes to mend what is lost here."""

QUARANTINE = 15
"""Seconds after the end of the last flow in which the kernel's maps are empty: its addresses are
kept for 10 s, and looked at each second."""

HOSTS = {4: NAME, 6: "app6.example.com"}
"""The host whose backend has an address of this IP version."""

HELLOS = {4: HELLO, 6: client_hello(HOSTS[6])}

FAR = {4: "192.0.2.7", 6: "2001:db8:0:6::7"}
"""The addresses of a client that reaches the world by one more hop."""

_FAR_GATEWAY = {4: "192.0.2.1", 6: "2001:db8:0:6::1"}
_FAR_NETWORK = {4: "192.0.2.0/24", 6: "2001:db8:0:6::/64"}
_FAR_PREFIX = {4: 24, 6: 64}
_NEIGHBOUR = {4: EDGE, 6: "2001:db8:0:9::2"}

_generations = count(1000)
"""Later than any that a controller comes to here."""

VERSIONS = pytest.mark.parametrize("version", [4, 6])


class PacketLab(Lab):
    """
    A lab with a bpffs, where the product leaves what is to outlive it.
    """

    def __init__(self) -> None:
        super().__init__()
        # for clients, none twice, and none that the kernel gives to others: a connection's line in
        # the log is found by its client's port
        self.ports = iter(range(10000, 32768))
        with ExitStack() as undo:
            undo.push(self._undo)
            self.bpffs = self.share / "bpf"
            self.bpffs.mkdir()
            run("mount", "-t", "bpf", "bpf", self.bpffs)
            undo.callback(run, "umount", "-l", self.bpffs)
            self._undo = undo.pop_all()

    def flags(self) -> tuple[str, ...]:
        """
        Write the flags that have the product hand over as packets.
        """
        return ("--handoff", HANDOFF, "--bpffs", str(self.bpffs))

    def product(self, *flags: str, routes: str) -> Sniroute:
        """
        Run the product, as `Lab.product` does.
        """
        return super().product(*self.flags(), *flags, routes=routes)

    def flow_ends(self) -> int:
        """
        Count the ends of flows that the kernel knows: two for each flow, until its quarantine.
        """
        return self._entries("ends")

    def _entries(self, name: str) -> int:
        pins = list(self.bpffs.rglob(name))
        if not pins:
            raise HarnessError(f"nothing is pinned below {self.bpffs}")
        dumps = (run("bpftool", "--json", "map", "dump", "pinned", pin) for pin in pins)
        return sum(len(json.loads(dump)) for dump in dumps)

    def notes(self) -> int:
        """
        Count the flows of which enough is noted for another router.
        """
        return self._entries("notes")

    def wait_for_no_flow(self) -> None:
        """
        Wait until the kernel has forgotten all flows.
        """
        wait_for("no flow left", lambda: self.flow_ends() == 0, timeout=QUARANTINE, every=0.5)

    def far(self, weather: Weather | None = None) -> Machine:
        """
        Switch on one more machine, with the addresses FAR, behind the world, which is its router.

        With *weather*, the way between the two is a rough one.
        """
        far = self._undo.enter_context(Machine(self.share))
        beside = self.world
        if weather is None:
            _plug(self.world, "far0", far, "eth0")
        else:
            beside = self._undo.enter_context(Machine(self.share))
            _plug(self.world, "far0", beside, "near0")
            _plug(beside, "far0", far, "eth0")
            switch_offloads_off(self.world, "far0")
            switch_offloads_off(far, "eth0")
        for version in (4, 6):
            ip = ("ip", f"-{version}")
            extra = ("nodad",) if version == 6 else ()
            for machine, device, address in (
                (self.world, "far0", _FAR_GATEWAY[version]),
                (far, "eth0", FAR[version]),
            ):
                prefix = f"{address}/{_FAR_PREFIX[version]}"
                machine.run(*ip, "addr", "add", prefix, "dev", device, *extra)
            far.run(*ip, "route", "add", "default", "via", _FAR_GATEWAY[version])
            kind = "ipv4" if version == 4 else "ipv6"
            self.world.run("sysctl", "-qw", f"net.{kind}.conf.all.forwarding=1")
            via = ("via", _NEIGHBOUR[version])
            self.host.run(*ip, "route", "add", _FAR_NETWORK[version], *via)
        if weather is not None:
            self._undo.enter_context(rough.carrying(beside, weather))
        return far

    def reach_directly(self, version: int, to: Container) -> None:
        """
        Have the host route the world's packets to *to*, as if there were no filters.
        """
        family = "ip" if version == 4 else "ip6"
        address = to.address[version]
        self.filters(
            f"insert rule inet filter through {family} daddr {address} accept\n"
            f"insert rule inet raw pre {family} daddr {address} accept"
        )
        via = FRONT[version]
        self.world.run(
            "ip", f"-{version}", "route", "replace", address, "via", via, "src", CLIENT[version]
        )


def _plug(one: Machine, device: str, other: Machine, its_device: str) -> None:
    peer = ("type", "veth", "peer", "name", its_device, "netns", str(other.pid))
    one.run("ip", "link", "add", device, *peer)
    one.run("ip", "link", "set", device, "up")
    other.run("ip", "link", "set", its_device, "up")


Ends = tuple[socket.socket, socket.socket]
"""The client's end of a connection, and the backend's."""


@dataclass(frozen=True, slots=True)
class House:
    """
    A lab with a container that serves both IP versions, and the product in front of it.
    """

    lab: PacketLab
    app: Container
    backends: dict[int, Backend]
    sniroute: Sniroute

    @classmethod
    @contextmanager
    def running(cls, lab: PacketLab, *flags: str, **keys: str) -> Iterator[Self]:
        """
        Run the product in *lab*; *keys* are further keys of its routes.
        """
        with ExitStack() as stack:
            app = lab.container(2)
            backends = {}
            for version, address in app.address.items():
                with app.network():
                    backend = Backend(address, 443, HELLOS[version])
                backends[version] = stack.enter_context(backend)
            routes = write_routes(app, **keys)
            sniroute = stack.enter_context(lab.product(*flags, routes=routes))
            yield cls(lab, app, backends, sniroute)

    def dial(
        self,
        version: int = 4,
        *,
        machine: Here | None = None,
        source: Address | None = None,
        to: Address | None = None,
    ) -> socket.socket:
        """
        Connect to the product from *machine*, by default the world, and say nothing.

        Without *source*, it is from a port that no other client has had.
        """
        address = to or (FRONT[version], 443)
        with (machine or self.lab.world).network():
            client = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
        client.settimeout(PATIENCE)
        # what is given once is to be free again at once
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            client.bind(source or ("", next(self.lab.ports)))
            client.connect(address)
        except BaseException:
            client.close()
            raise
        return client

    @contextmanager
    def joined(
        self,
        version: int = 4,
        *,
        machine: Here | None = None,
        source: Address | None = None,
        to: Address | None = None,
    ) -> Iterator[Ends]:
        """
        Open a connection through the product, by whatever hand-off.
        """
        with self.dial(version, machine=machine, source=source, to=to) as client:
            client.sendall(HELLOS[version])
            with self.backends[version].accept() as end:
                end.settimeout(PATIENCE)
                yield client, end

    @contextmanager
    def spliced(
        self,
        version: int = 4,
        *,
        machine: Here | None = None,
        source: Address | None = None,
        to: Address | None = None,
    ) -> Iterator[Ends]:
        """
        Open a connection, which, as the log has it when it has ended, is handed over as packets.
        """
        with self.joined(version, machine=machine, source=source, to=to) as (client, end):
            name = client.getsockname()[:2]
            yield client, end
        line = self.line(name)

        # without the rest of the line, which would hide the reason where the two differ
        assert (HANDOFF, []) == (line.get("handoff"), line.get("refused_by", []))

    def line(self, client: Address, **fields: Any) -> dict[str, Any]:
        """
        Wait for the line in the log of a connection that has ended.
        """
        return access_line(self.sniroute, client, **fields)

    def tell(self, networks: Iterable[str] = (), *, alive: bool = True) -> None:
        """
        Give the router the table that a controller with an engine has.

        It has the routes to the container, which is *alive* or not, and the host's *networks*.
        """
        control = self.lab.share / "router.sock"
        (told,) = operate.ask(control, {"type": "routes"})
        running = {backend["source"]: [] for r in told["routes"] for backend in r["backends"]}
        if alive:
            running = {source: list(self.app.address.values()) for source in running}
        routes = read_routes(told["routes"])
        table = RouteTable(next(_generations), routes, networks, running)
        message = {"type": "table", **dump_table(table)}
        (answer,) = operate.ask(control, message)

        assert "ack" == answer["type"], answer

    def lines(self, client: Address) -> list[dict[str, Any]]:
        """
        Read the lines in the log of all connections from *client*, which have ended.
        """
        return [
            line
            for line in self.sniroute.log()
            if line["event"] == "connection" and (line["client"], line["client_port"]) == client
        ]

    def refused(self, client: Address) -> str:
        """
        Wait for a connection's line in the log, and read why it was not handed over as packets.
        """
        line = self.line(client)

        assert HANDOFF != line["handoff"], line

        reasons = [reason for rung, _, reason in _refusals(line) if rung == HANDOFF]
        assert len(reasons) == 1, line
        return reasons[0]


def _refusals(line: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    return (refusal.partition(": ") for refusal in line.get("refused_by", ()))


def write_routes(app: Container, **keys: str) -> str:
    """
    Write the routes to *app*, each with *keys*.
    """
    return "".join(route(HOSTS[v], address, **keys) for v, address in app.address.items())


class InLab(Promises):
    """
    Have promises kept in a lab: with clients out in the world, and backends in a container.

    A subclass says whose address backends see, as `--client-ip` has it.
    """

    handoff = HANDOFF
    client_ip: ClassVar[str]
    origin = EDGE

    world: ClassVar[PacketLab]
    container: ClassVar[Container]

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def lab(cls) -> Iterator[PacketLab]:
        """
        Be in the world meanwhile, for the class.
        """
        with PacketLab() as lab:
            # its filters let nothing in but at the ports of a router, and here there are many
            lab.filters("add rule inet filter in tcp dport 32768-60999 accept")
            cls.world, cls.container = lab, lab.container(2)
            cls.home = cls.container.address[4]
            lab.world.run("ip", "route", "replace", FRONT[4], "dev", "eth0", "src", EDGE)
            with lab.world.network():
                yield lab

    @classmethod
    @contextmanager
    def at_home(cls) -> Iterator[None]:
        """
        Be in the container.
        """
        with cls.container.network():
            yield

    @classmethod
    @contextmanager
    def router(
        cls,
        routes: Mapping[str, Address],
        *options: str,
        keys: Mapping[str, str] | None = None,
    ) -> Iterator[Product]:
        """
        Run the product on the host.
        """
        flags = (*cls.world.flags()[2:], "--client-ip", cls.client_ip, *options)
        run = loopback.router(
            cls.handoff, routes, *flags, keys=keys, address=FRONT[4], metrics=FRONT[4]
        )
        with ExitStack() as stack:
            with cls.world.host.network():
                product = stack.enter_context(run)
            yield product


def exchange(ends: Ends, size: int) -> None:
    """
    Send *size* bytes each way at once, and check that they arrive whole.
    """
    data = BLOCK[:size]
    with ThreadPoolExecutor(2) as writers:
        writing = [writers.submit(end.sendall, data) for end in ends]
        for end in ends:
            assert data == read_exactly(end, size)
        for written in writing:
            written.result()


def told(sniroute: Sniroute) -> list[dict[str, Any]]:
    """
    Read the lines in the log of connections that have ended.
    """
    return [line for line in sniroute.log() if line["event"] == "connection"]
