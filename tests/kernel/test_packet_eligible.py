"""
Which connections are handed over as packets, and what the log says of those that are not.
"""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from harness.ends import Backend, client_hello, read_all, read_exactly
from harness.flood import SOURCES, send_syns
from harness.lab import (
    ANYWHERE,
    CLIENT,
    EDGE,
    FRONT,
    Container,
    gateway,
    route,
)
from harness.machines import Here
from harness.packet_lab import ACTIVE, HANDOFF, HELLOS, HOSTS, VERSIONS, Ends, House, PacketLab
from harness.sockets import counts
from harness.tools import wait_for
from harness.tunnel import DEVICE, tunnel

from controller.core.proxyprotocol import read_header, write_header

REFUSALS = "sniroute_handoff_refusals_total"

NETWORKS = [f"198.18.{n}.0/24" for n in (1, 2)] + [f"2001:db8:0:{n}::/64" for n in (1, 2)]

LOOPBACKS = {4: "127.0.0.1", 6: "::1"}

FLOOD = 60_000
"""More SYNs than are noted at once, several times over."""

BESIDE = {4: "192.0.2.1", 6: "2001:db8:0:8::1"}
"""The host's address where there is a second way to it."""

THERE = {version: f"{address}8" for version, address in BESIDE.items()}
"""The address of whoever has that way."""


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    """
    The product in front of a container.
    """
    with PacketLab() as lab:
        lab.bridge(2)
        with House.running(lab) as house:
            yield house


@pytest.fixture(scope="module")
def neighbour(house: House) -> Container:
    """
    A container beside the backend.
    """
    return house.lab.container(3)


@pytest.fixture(scope="module")
def stranger(house: House) -> Container:
    """
    A container on another bridge.
    """
    return house.lab.container(4, bridge=2)


def talk(ends: Ends) -> None:
    """
    Have some words pass each way.
    """
    for near, far in (ends, ends[::-1]):
        near.sendall(b"by whatever way")

        assert b"by whatever way" == read_exactly(far, 15)


def refusal(house: House, version: int, machine: Here, to: tuple[str, int] | None = None) -> str:
    """
    Talk over a connection from *machine*, and read why it was not handed over as packets.
    """
    with house.joined(version, machine=machine, to=to) as ends:
        name = ends[0].getsockname()[:2]
        talk(ends)
    return house.refused(name)


# --- those that are not ---


@VERSIONS
def test_a_client_beside_its_backend_is_not(
    version: int, house: House, neighbour: Container
) -> None:
    """
    A client on the backend's own bridge is served by the next hand-off, and the log says why.
    """
    before = house.sniroute.metric(REFUSALS, handoff=HANDOFF, reason="hairpin")

    assert "hairpin" == refusal(house, version, neighbour)
    assert before + 1 == house.sniroute.metric(REFUSALS, handoff=HANDOFF, reason="hairpin")


@VERSIONS
def test_a_backend_that_calls_itself_is_not(version: int, house: House) -> None:
    """
    A container that reaches its own name through the router is served by the next hand-off.
    """
    assert "hairpin" == refusal(house, version, house.app)


@VERSIONS
def test_a_client_on_the_host_is_not(version: int, house: House) -> None:
    """
    A client on the router's own host passes no device, and is served by the next hand-off.
    """
    assert "unseen" == refusal(house, version, house.lab.host)


@VERSIONS
def test_a_client_on_loopback_is_not(version: int, house: House) -> None:
    """
    Nor does a client by loopback.
    """
    to = LOOPBACKS[version], ANYWHERE

    assert "unseen" == refusal(house, version, house.lab.host, to)


def test_a_client_whose_address_is_translated_is_not(house: House) -> None:
    """
    Where the host's own NAT changes the addresses, its packets are not those the router saw.
    """
    port = 10443
    rules = f"""
    table ip led {{
        chain pre {{ type nat hook prerouting priority dstnat;
            ip daddr {FRONT[4]} tcp dport {port} redirect to :443;
        }}
    }}
    """
    house.lab.filters(rules)
    try:
        assert "unseen" == refusal(house, 4, house.lab.world, (FRONT[4], port))
    finally:
        house.lab.filters("delete table ip led")


@VERSIONS
def test_a_backend_that_sees_a_translated_address_is_not(
    version: int, house: House, stranger: Container
) -> None:
    """
    Where the host's own NAT changes the addresses towards the backend, its packets are left alone.

    A bridge's packets may pass netfilter before they pass the hook, and have been changed back.
    """
    assert "unseen" == refusal(house, version, stranger)


def test_a_backend_of_the_other_family_is_not(house: House) -> None:
    """
    Packets of one IP version do not become those of the other.
    """
    with house.dial(4) as client:
        client.sendall(HELLOS[6])
        with house.backends[6].accept() as end:
            talk((client, end))
        name = client.getsockname()[:2]

    assert "family" == house.refused(name)


@VERSIONS
def test_where_the_host_does_not_forward_nobody_is(version: int, house: House) -> None:
    """
    The kernel would route no packet of the client's on, so neither do we.
    """
    forwarding = f"net.ipv{version}.conf.out0.forwarding"
    house.lab.host.run("sysctl", "-qw", f"{forwarding}=0")
    try:
        assert "forwarding_off" == refusal(house, version, house.lab.world)
    finally:
        house.lab.host.run("sysctl", "-qw", f"{forwarding}=1")
    with house.spliced(version) as ends:
        talk(ends)


@VERSIONS
def test_a_narrow_bridge_is_not_for_clients_that_were_told_more(version: int) -> None:
    """
    A client that may send what does not fit its backend's network is served by the next hand-off.
    """
    with PacketLab() as lab, House.running(lab) as house:
        for machine, device in ((lab.host, "br1"), (lab.host, "port2"), (house.app, "eth0")):
            machine.run("ip", "link", "set", device, "mtu", "1300")

        assert "mtu" == refusal(house, version, lab.world)


@contextmanager
def way_in(lab: PacketLab) -> Iterator[None]:
    """
    Give the world a second way to the host, by a device of its own there, for a while.
    """
    peer = ("type", "veth", "peer", "name", "eth1", "netns", str(lab.world.pid))
    lab.host.run("ip", "link", "add", "lan0", *peer)
    lab.host.run("ip", "link", "set", "lan0", "up")
    lab.world.run("ip", "link", "set", "eth1", "up")
    for version in (4, 6):
        assign(lab.world, version, THERE[version], "eth1")
    yield
    lab.host.run("ip", "link", "del", "lan0")


def assign(machine: Here, version: int, address: str, device: str) -> None:
    """
    Give *device* an address in the network of that second way.
    """
    prefix, extra = (24, ()) if version == 4 else (64, ("nodad",))
    machine.run("ip", "addr", "add", f"{address}/{prefix}", "dev", device, *extra)


@VERSIONS
def test_a_client_by_a_macvlan_of_the_host_is_not(version: int) -> None:
    """
    What passes a macvlan's parent and then the macvlan has no one place to be translated at.
    """
    with PacketLab() as lab, way_in(lab):
        foot = ("foot", "link", "lan0", "type", "macvlan", "mode", "bridge")
        lab.host.run("ip", "link", "add", *foot)
        lab.host.run("ip", "link", "set", "foot", "up")
        assign(lab.host, version, BESIDE[version], "foot")
        lab.check_sources(1)
        with House.running(lab) as house:
            assert "stacked" == refusal(house, version, lab.world, (BESIDE[version], ANYWHERE))


@VERSIONS
def test_a_client_that_came_another_way_once_is(version: int) -> None:
    """
    What was noted of an earlier connection of the same addresses counts no more.
    """
    to, source = (BESIDE[version], ANYWHERE), ("", 40000)
    with PacketLab() as lab, House.running(lab) as house:
        for is_last in (False, True):
            with way_in(lab):
                assign(lab.host, version, BESIDE[version], "lan0")
                wait_for("lan0", lambda: "lan0" in house.sniroute.command("packet", "status"))
                if is_last:
                    with house.spliced(version, source=source, to=to) as ends:
                        talk(ends)
                else:
                    with house.dial(version, source=source, to=to) as client:
                        # no TIME_WAIT is to keep the port
                        client.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )


@VERSIONS
def test_a_client_by_a_tunnel_is_not(version: int) -> None:
    """
    Packets without Ethernet headers are not followed: the next hand-off serves a client of a VPN.
    """
    with PacketLab() as lab, tunnel(lab.host, lab.world):
        assign(lab.host, version, BESIDE[version], DEVICE)
        assign(lab.world, version, THERE[version], DEVICE)
        with House.running(lab) as house:
            assert "unseen" == refusal(house, version, lab.world, (BESIDE[version], ANYWHERE))


@VERSIONS
def test_a_backend_by_a_tunnel_is_not(version: int) -> None:
    """
    Nor are those of a backend: the next hand-off reaches it.
    """
    with PacketLab() as lab, tunnel(lab.host, app := lab.container(2)):
        assign(lab.host, version, BESIDE[version], DEVICE)
        assign(app, version, THERE[version], DEVICE)
        # its replies to the client's own address would come by the bridge
        routes = route(HOSTS[version], THERE[version], client_ip="nat")
        with app.network():
            backend = Backend(THERE[version], 443, HELLOS[version])
        with backend, lab.product(routes=routes) as sniroute:
            house = House(lab, app, {version: backend}, sniroute)

            assert "unseen" == refusal(house, version, lab.world)


@pytest.mark.parametrize("is_route", [False, True], ids=["device", "route"])
@VERSIONS
def test_a_backend_that_takes_less_than_its_client_may_send_is_not(
    version: int,
    is_route: bool,  # noqa: FBT001
) -> None:
    """
    A container that asks for smaller segments than the client was told of gets them.
    """
    with PacketLab() as lab, House.running(lab) as house:
        if is_route:
            via = ("via", gateway(version), "advmss", "1000")
            house.app.run("ip", f"-{version}", "route", "replace", "default", *via)
        else:
            house.app.run("ip", "link", "set", "eth0", "mtu", "1300")

        assert "mtu" == refusal(house, version, lab.world)


def test_replies_by_another_way_are_not() -> None:
    """
    A client that is heard by one device and reached by another one has its packets left alone.
    """
    with PacketLab() as lab:
        # the world has a second way in, which the host does not answer by
        lab.host.run("ip", "link", "add", "out1", "type", "veth", "peer", "name", "out1p")
        lab.host.run("ip", "link", "set", "out1p", "netns", str(lab.world.pid), "name", "eth1")
        lab.host.run("ip", "addr", "add", "203.0.113.5/30", "dev", "out1")
        lab.world.run("ip", "addr", "add", "203.0.113.6/30", "dev", "eth1")
        lab.host.run("ip", "link", "set", "out1", "up")
        lab.world.run("ip", "link", "set", "eth1", "up")
        lab.check_sources(2)
        route_in = ("203.0.113.5", "dev", "eth1", "src", CLIENT[4])
        lab.world.run("ip", "route", "replace", *route_in)
        with House.running(lab) as house:
            assert "asymmetric" == refusal(house, 4, lab.world, ("203.0.113.5", ANYWHERE))


def test_a_route_may_ask_for_another(house: House) -> None:
    """
    A route whose hand-off is another one is not refused anything: nothing else was tried.
    """
    host = "relay.test"
    file = house.lab.share / "routes.toml"
    before = file.read_text()
    file.write_text(before + route(host, house.app.address[4], 1443, handoff="relay"))
    house.sniroute.wait_for_route(host, house.app.address[4])
    hello = client_hello(host)
    with house.app.network():
        listener = socket.create_server((house.app.address[4], 1443))
    with listener, house.dial() as client:
        name = client.getsockname()[:2]
        client.sendall(hello)
        end, _ = listener.accept()
        with end:
            assert hello == read_exactly(end, len(hello))

            talk((client, end))
    line = house.line(name)
    file.write_text(before)

    assert ("relay", None) == (line["handoff"], line.get("refused_by"))


# --- those that are ---


@VERSIONS
def test_a_client_on_another_bridge_is(version: int, house: House, stranger: Container) -> None:
    """
    A container of another network is a client like those of the world, if that is known.
    """
    house.tell(NETWORKS)
    try:
        with house.spliced(version, machine=stranger) as ends:
            talk(ends)
    finally:
        house.tell()


@VERSIONS
def test_a_client_that_takes_less_is(version: int) -> None:
    """
    A client that asks for small segments gets them: the backend was told of it.
    """
    with PacketLab() as lab, House.running(lab) as house:
        small = ("dev", "eth0", "src", CLIENT[version], "advmss", "1000")
        lab.world.run("ip", f"-{version}", "route", "replace", FRONT[version], *small)
        with house.spliced(version) as ends:
            talk(ends)
            # without the twelve bytes of the timestamps
            assert 988 == ends[1].getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)


@pytest.mark.parametrize("is_forwarded", [False, True], ids=["to the product", "through the host"])
def test_a_slow_client_in_a_flood_of_syns_is(is_forwarded: bool) -> None:  # noqa: FBT001
    """
    What is noted of a client lasts until the rest of its hello comes, whoever else says SYN.
    """
    with PacketLab() as lab, House.running(lab) as house:
        lab.host.run("ip", "route", "add", SOURCES, "via", EDGE)
        lab.reach_directly(4, house.app)
        to, answers = (house.app.address[4], 81), (house.app, "TcpOutRsts")
        if not is_forwarded:
            to, answers = lab.front, (lab.host, "TcpOutSegs")
        with house.dial() as client:
            client.sendall(HELLOS[4][:100])
            before = counts(*answers)
            send_syns(lab.world, to, FLOOD)
            after = counts(*answers)
            client.sendall(HELLOS[4][100:])
            with house.backends[4].accept() as end:
                talk((client, end))
            name = client.getsockname()[:2]

        assert sum(after.values()) - sum(before.values()) > FLOOD / 2
        assert HANDOFF == house.line(name)["handoff"]


@pytest.fixture(scope="module")
def told() -> Iterator[House]:
    """
    The product, which trusts the world's own address with PROXY headers.
    """
    with PacketLab() as lab, House.running(lab, "--proxy-protocol-from", EDGE) as house:
        lab.world.run("ip", "route", "replace", FRONT[4], "dev", "eth0", "src", EDGE)
        yield house


SPEAKER = ("198.51.100.66", 4321)
"""Whom a PROXY header tells of."""


@pytest.mark.parametrize("apart", [False, True], ids=["hello behind it", "hello later"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_header_of_a_sender_is(version: str, apart: bool, told: House) -> None:  # noqa: FBT001
    """
    Behind a PROXY header, which was read, connections are handed over as packets all the same.
    """
    header = write_header(version, SPEAKER, (FRONT[4], 443), authority=None, alpn=None)
    with told.dial() as client:
        port = client.getsockname()[1]
        client.sendall(header + (b"" if apart else HELLOS[4]))
        if apart:
            client.sendall(HELLOS[4])
        with told.backends[4].accept() as end:
            # the hello goes ahead here: who has it may speak before the hand-over
            wait_for("the hand-over", lambda: told.sniroute.metric(ACTIVE, handoff=HANDOFF) == 1)
            talk((client, end))
    line = told.line(SPEAKER, sender_port=port)

    assert HANDOFF == line["handoff"], line
    assert (EDGE, port) == (line["sender"], line["sender_port"])


@pytest.mark.parametrize("client_ip", ["auto", "nat"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_header_for_the_backend_is(version: str, client_ip: str) -> None:
    """
    A backend that wants a PROXY header gets it first, and then packets of its client.
    """
    keys = {"proxy_protocol": version, "client_ip": client_ip}
    with PacketLab() as lab:
        app = lab.container(2)
        with app.network():
            listener = socket.create_server((app.address[4], 443))
        routes = route("app.example.com", app.address[4], **keys)
        with listener, lab.product(routes=routes) as sniroute:
            house = House(lab, app, {}, sniroute)
            with house.dial() as client:
                name = client.getsockname()[:2]
                client.sendall(HELLOS[4])
                end, peer = listener.accept()
                with end:
                    got = b""
                    while not got.endswith(HELLOS[4]):
                        got += end.recv(65536)
                    end.sendall(b"who is there?")

                    assert b"who is there?" == read_exactly(client, 13)

                    client.sendall(b"and more")
                    client.shutdown(socket.SHUT_WR)
                    got += read_all(end)
                    header = read_header(got)

            assert name == header.source
            assert HELLOS[4] + b"and more" == got[header.size :]
            assert (CLIENT[4] if client_ip == "auto" else gateway(4)) == peer[0]
            assert HANDOFF == house.line(name)["handoff"]
