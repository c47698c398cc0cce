"""
By packets, over networks as they are: lossy, narrow, congested, and with ends that lack options.
"""

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness.ends import PIECE, Sender, read_exactly, receive_digest
from harness.machines import Here, Machine
from harness.packet_lab import (
    FAR,
    HANDOFF,
    HELLOS,
    PATIENCE,
    VERSIONS,
    Ends,
    House,
    PacketLab,
)
from harness.rough import BAD, Weather
from harness.sockets import counts, devices, info, switch_offloads_off
from harness.tools import wait_for
from harness.transfer_promises import BLOCK

from controller.core.session import Side

NARROW = 1300
"""The MTU of a way that is narrower than both ends know."""

SMALL = 2 * PIECE

AT_ONCE = 1.0
"""Seconds in which SMALL bytes arrive when their sender is told of a narrow way, and does not have
to find out by what is lost."""

SECOND = 1.1

HEARD = 3.0
"""Seconds in which a sender hears of a narrow device: the program looks at it once a second."""

OPTIONS = {
    "everything": (),
    "no timestamps": ("tcp_timestamps",),
    "no SACK": ("tcp_sack",),
    "no window scaling": ("tcp_window_scaling",),
    "nothing": ("tcp_timestamps", "tcp_sack", "tcp_window_scaling"),
}
"""What an end may do without, by the settings that it is switched off with."""

LACKING = pytest.mark.parametrize("off", OPTIONS.values(), ids=OPTIONS.keys())


@contextlib.contextmanager
def without(machine: Here, *settings: str) -> Iterator[None]:
    """
    Have *machine*'s TCP do without what *settings* switch on.
    """
    for setting in settings:
        machine.run("sysctl", "-qw", f"net.ipv4.{setting}=0")
    try:
        yield
    finally:
        for setting in settings:
            machine.run("sysctl", "-qw", f"net.ipv4.{setting}=1")


def exchange(ends: Ends, size: int) -> None:
    """
    Send *size* bytes each way at once, and check that they arrive whole.
    """
    up, down = (Sender(end, size, BLOCK) for end in ends)
    with ThreadPoolExecutor(2) as readers:
        received = list(readers.map(receive_digest, reversed(ends)))

    assert [(size, up.join()), (size, down.join())] == received


# --- loss, and order ---


@pytest.fixture(scope="module")
def rough() -> Iterator[tuple[House, Machine]]:
    """
    The product, and a client that reaches it over a rough way.
    """
    with PacketLab() as lab:
        far = lab.far(BAD)
        with House.running(lab) as house:
            yield house, far


@VERSIONS
@LACKING
def test_a_rough_way_takes_no_byte(
    off: tuple[str, ...], version: int, rough: tuple[House, Machine]
) -> None:
    """
    With 2 % lost each way, 2 % overtaken and 1 % doubled, all arrives: SACK or not, and so on.
    """
    house, far = rough
    with without(far, *off), house.spliced(version, machine=far) as ends:
        exchange(ends, SMALL)


@VERSIONS
@LACKING
def test_a_client_may_lack_options(off: tuple[str, ...], version: int, lab: PacketLab) -> None:
    """
    What the client lacks the router does not offer to the backend: they agree, by packets.
    """
    with House.running(lab) as house, without(lab.world, *off), house.spliced(version) as ends:
        exchange(ends, 32 * PIECE)


@VERSIONS
@pytest.mark.parametrize(
    ("off", "reason"),
    [
        (("tcp_timestamps",), "options"),
        (("tcp_sack",), "options"),
        (("tcp_timestamps", "tcp_sack"), "options"),
        (("tcp_window_scaling",), None),
    ],
)
def test_a_backend_may_lack_options(
    off: tuple[str, ...], reason: str | None, version: int, lab: PacketLab
) -> None:
    """
    What the client was promised and the backend lacks is no harm: the next hand-off has both.
    """
    with House.running(lab) as house, without(house.app, *off):
        with house.joined(version) as ends:
            name = ends[0].getsockname()[:2]
            exchange(ends, 32 * PIECE)

        if reason is None:
            assert HANDOFF == house.line(name)["handoff"]
        else:
            assert reason == house.refused(name)


# --- narrow ways ---


def carry(source: socket.socket, to: socket.socket, size: int = SMALL) -> float:
    """
    Send *size* bytes, check that they arrive whole, and tell how many seconds that took.
    """
    data = (BLOCK * (size // PIECE + 1))[:size]
    began = time.monotonic()
    with ThreadPoolExecutor(1) as writer:
        writing = writer.submit(source.sendall, data)
        arrived = read_exactly(to, size)
        writing.result()
    took = time.monotonic() - began

    assert data == arrived

    return took


def narrow(lab: PacketLab, version: int) -> None:
    """
    Have the world pass no more than NARROW bytes at once on to the far client.
    """
    mtu = ("mtu", "lock", str(NARROW))
    lab.world.run("ip", f"-{version}", "route", "replace", FAR[version], "dev", "far0", *mtu)


@VERSIONS
def test_a_narrow_way_is_found(version: int, lab: PacketLab) -> None:
    """
    A router behind the host that needs smaller packets is heard by the container, at once.
    """
    far = lab.far()
    with House.running(lab) as house:
        narrow(lab, version)
        with house.spliced(version, machine=far) as (client, end):
            assert carry(end, client) < AT_ONCE
            assert NARROW == info(end).pmtu


@VERSIONS
def test_a_way_that_becomes_narrow_is_found(version: int, lab: PacketLab) -> None:
    """
    When the way becomes narrow in the middle of a download, that goes on within a second.
    """
    far = lab.far()
    with House.running(lab) as house, house.spliced(version, machine=far) as (client, end):
        carry(end, client)
        narrow(lab, version)

        assert carry(end, client) < AT_ONCE
        assert NARROW == info(end).pmtu


NARROWED = pytest.mark.parametrize(
    ("device", "source"), [("out0", Side.BACKEND), ("br1", Side.CLIENT)], ids=["out0", "br1"]
)
"""The device of the host that becomes narrow, and who sends by it."""


def tells(ends: Ends, source: Side) -> bool:
    """
    Send a little from *source*, and tell whether it knows of the narrow device.
    """
    assert carry(ends[source], ends[source.other]) < AT_ONCE

    return info(ends[source]).pmtu == NARROW


@VERSIONS
@NARROWED
def test_a_device_of_the_host_that_becomes_narrow_is_heard_of(
    device: str, source: Side, version: int, lab: PacketLab
) -> None:
    """
    When one of the host's own devices takes smaller packets only, the sender hears of it.
    """
    with House.running(lab) as house, house.spliced(version) as ends:
        carry(ends[source], ends[source.other])
        lab.host.run("ip", "link", "set", device, "mtu", str(NARROW))

        wait_for("word of it", lambda: tells(ends, source), timeout=HEARD)


@contextlib.contextmanager
def forgetting(host: Here) -> Iterator[None]:
    """
    Have *host* forget all its neighbours meanwhile, every 20 ms.
    """
    command = host.outside("sh", "-c", "while ip neigh flush all; do sleep 0.02; done")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as loop:
        try:
            yield
        finally:
            loop.kill()


@VERSIONS
def test_neighbours_may_be_forgotten(version: int, lab: PacketLab) -> None:
    """
    A transfer goes on while the host has to ask for its neighbours again and again.
    """
    with House.running(lab) as house, house.spliced(version) as ends, forgetting(lab.host):
        exchange(ends, 128 * PIECE)


@VERSIONS
@NARROWED
def test_a_narrow_device_is_remembered_without_neighbours(
    device: str, source: Side, version: int, lab: PacketLab
) -> None:
    """
    When the host knows no neighbour, of which it would hear the MTU, the last one holds.
    """
    with House.running(lab) as house, house.spliced(version) as ends:
        sender, machine = ends[source], (lab.world, house.app)[source]
        lab.host.run("ip", "link", "set", device, "mtu", str(NARROW))
        wait_for("word of it", lambda: tells(ends, source), timeout=HEARD)
        machine.run("ip", f"-{version}", "route", "flush", "cache")
        lab.host.run("ip", "neigh", "flush", "all")
        # the program looks at the first packet of a second
        time.sleep(SECOND)

        assert carry(sender, ends[source.other]) < AT_ONCE
        assert NARROW == info(sender).pmtu


@VERSIONS
def test_a_narrow_device_answers_in_measure(version: int, lab: PacketLab) -> None:
    """
    However many packets are too large, their sender hears of it ten times a second at most.
    """
    name = "IcmpInDestUnreachs" if version == 4 else "Icmp6InPktTooBigs"
    with House.running(lab) as house, house.spliced(version) as (client, end):
        # each packet by itself, and many of them at once
        switch_offloads_off(house.app, "eth0")
        carry(end, client)
        began, before = time.monotonic(), counts(house.app, name)
        lab.host.run("ip", "link", "set", "out0", "mtu", str(NARROW))
        while info(end).pmtu != NARROW and time.monotonic() < began + HEARD:
            carry(end, client)
        after, took = counts(house.app, name), time.monotonic() - began

        assert 1 <= after[name] - before[name] <= 10 * took + 1


# --- congestion ---


@pytest.mark.parametrize("asks", [0, 1], ids=["host does not ask", "host asks"])
@VERSIONS
def test_congestion_is_told_to_who_understands(version: int, asks: int, lab: PacketLab) -> None:
    """
    Marks for congestion reach a backend that knows of them; another one never sees any.

    The client always asks for ECN, and the router's leg to the backend has it if the host asks.
    """
    far = lab.far(Weather(marked=0.05))
    far.run("sysctl", "-qw", "net.ipv4.tcp_ecn=1")
    lab.host.run("sysctl", "-qw", f"net.ipv4.tcp_ecn={asks or 2}")
    names = (
        ("IpExtInCEPkts", "IpExtInECT0Pkts") if version == 4 else ("Ip6InCEPkts", "Ip6InECT0Pkts")
    )
    with House.running(lab) as house, house.spliced(version, machine=far) as ends:
        # what was said before the hand-over is not looked at
        carry(*ends, 1)
        before = counts(house.app, *names)
        exchange(ends, SMALL)
        after = counts(house.app, *names)
    marked, capable = (after[name] - before[name] for name in names)

    assert bool(asks) == (marked > 0)
    assert bool(asks) == (capable > 0)


# --- packets that are no longer as Linux likes them best ---


@VERSIONS
def test_offloads_may_be_off(version: int, lab: PacketLab) -> None:
    """
    Without TSO, GSO, GRO and checksums in hardware, on every device, all arrives whole.
    """
    with House.running(lab) as house:
        for machine in (lab.world, lab.host, house.app):
            for device in devices(machine):
                switch_offloads_off(machine, device)
        with house.spliced(version) as ends:
            exchange(ends, 32 * PIECE)


PADDED = bytes((0, 0, 1, 4, 0, 0, 0, 0))
"""An extension header of eight bytes with nothing in it (RFC 8200, 4.2)."""

EXTENSIONS = {
    "hop-by-hop options": 54,
    "destination options": 59,
}
"""Of IPv6, by the socket option that has each packet carry one (linux/in6.h)."""


@pytest.mark.parametrize("option", EXTENSIONS.values(), ids=EXTENSIONS.keys())
@pytest.mark.parametrize("first", [True, False], ids=["from the SYN on", "later"])
def test_extension_headers_are_no_harm(first: bool, option: int, lab: PacketLab) -> None:  # noqa: FBT001
    """
    Packets of either end that have IPv6 extension headers arrive like others.
    """
    with House.running(lab) as house:
        with house.dial(6) as client:
            name = client.getsockname()[:2]
            if first:
                client.setsockopt(socket.IPPROTO_IPV6, option, PADDED)
            client.sendall(HELLOS[6])
            with house.backends[6].accept() as end:
                end.settimeout(PATIENCE)
                carry(client, end)
                client.setsockopt(socket.IPPROTO_IPV6, option, PADDED)
                carry(client, end)
                # a few bytes at a time: that is all that a socket sends so which was accepted
                end.setsockopt(socket.IPPROTO_IPV6, option, PADDED)
                for _ in range(100):
                    carry(end, client, 1000)
                    carry(client, end, 1000)

        assert HANDOFF == house.line(name)["handoff"]


# --- processors ---


def test_two_processors_may_share_the_work(lab: PacketLab) -> None:
    """
    With RPS on every device, packets of one flow are at work on any processor: all arrives.
    """
    with House.running(lab) as house, contextlib.ExitStack() as stack:
        for machine in (lab.world, lab.host, house.app):
            masks = "for f in /sys/class/net/*/queues/rx-*/rps_cpus; do echo 3 >$f; done"
            machine.run("unshare", "--mount", "sh", "-c", f"mount -t sysfs sysfs /sys; {masks}")
        pairs = [stack.enter_context(house.spliced(version)) for version in (4, 6) * 4]
        with ThreadPoolExecutor(len(pairs)) as players:
            for played in players.map(lambda ends: exchange(ends, 32 * PIECE), pairs):
                assert played is None
