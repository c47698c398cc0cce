"""
The backend sees the client's own address, and a host's other rules see nothing.

Three machines: a client, a host with a bridge and the filters that Docker puts up, and a container
on the bridge.  The product's code runs with no more capabilities than the product has.
"""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyprctl
import pytest
from harness.machines import Machine, join
from harness.tools import CAPABILITIES, REPOSITORY, wait_for

from controller.core.clientip import MARK, MASK, PRIORITY, TABLE
from controller.router.plumbing import Plumbing, PlumbingError, Watch, ip_versions, read_network

CLIENT = {4: "198.51.100.7", 6: "2001:db8:0:7::7"}
GATEWAY = {4: "198.18.1.1", 6: "2001:db8:0:1::1"}
CONTAINER = {4: "198.18.1.2", 6: "2001:db8:0:1::2"}
LENGTH = {4: 24, 6: 64}
DEFAULT = {4: "0.0.0.0/0", 6: "::/0"}
PORT = 443
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
IP_TRANSPARENT = {4: (socket.SOL_IP, 19), 6: (socket.IPPROTO_IPV6, 75)}

PATIENCE = 1.0
"""Seconds in which a reply comes, if it ever does."""

DOCKERS_FILTERS = """
table ip nat {
    chain post { type nat hook postrouting priority srcnat;
        ip saddr 198.18.1.0/24 oifname != "br0" masquerade;
    }
}
table ip6 nat {
    chain post { type nat hook postrouting priority srcnat;
        ip6 saddr 2001:db8:0:1::/64 oifname != "br0" masquerade;
    }
}
table inet filter {
    chain direct { type filter hook prerouting priority raw;
        iifname != "br0" ip daddr 198.18.1.2 drop;
        iifname != "br0" ip6 daddr 2001:db8:0:1::2 drop;
    }
    chain through { type filter hook forward priority filter; policy drop;
        ct state established,related accept;
        iifname "br0" accept;
    }
    chain in { type filter hook input priority filter; policy drop;
        iifname "lo" accept;
        ct state established,related accept;
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept;
    }
}
"""

REVERSE_PATH = """
table inet firewall {
    chain pre { type filter hook prerouting priority filter + 10;
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept;
        fib saddr . mark . iif oif missing drop;
    }
}
"""
"""As firewalld checks IPv6 by default."""

FOREVER = """
import time
from controller.router.plumbing import Plumbing
Plumbing(0x1000, 0x1000, 99, 98).install()
print("up", flush=True)
time.sleep(600)
"""


@dataclass(frozen=True, slots=True)
class Lab:
    """
    The host, and a listener in the container for each IP version.
    """

    host: Machine
    listeners: dict[int, socket.socket]

    def filters(self, text: str) -> None:
        """
        Load nftables rules on the host.
        """
        self.host.run("sh", "-c", f"nft -f - <<'EOF'\n{text}\nEOF")

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

    @contextlib.contextmanager
    def router(self) -> Iterator[None]:
        """
        Be in the router's place: on the host, with the router's capabilities.
        """
        few = {pyprctl.Cap[name.upper()] for name in CAPABILITIES}
        before = pyprctl.CapState.get_current()
        with self.host.network():
            only = pyprctl.CapState(few, before.permitted, before.inheritable)
            only.set_current()
            try:
                yield
            finally:
                before.set_current()

    def plain(self, version: int) -> bool:
        """
        Connect from the host's own address.
        """
        with self.host.network():
            ours = socket.create_connection((CONTAINER[version], PORT), PATIENCE)
        theirs, _ = self.listeners[version].accept()
        with ours, theirs:
            return GATEWAY[version] == theirs.getpeername()[0]

    @contextlib.contextmanager
    def dial(self, version: int, port: int = 0) -> Iterator[tuple[socket.socket, socket.socket]]:
        """
        Connect from the client's address to the container: the host's end and the container's.
        """
        with contextlib.ExitStack() as stack:
            with self.router():
                ours = stack.enter_context(socket.socket(FAMILY[version]))
                ours.setsockopt(*IP_TRANSPARENT[version], 1)
                ours.settimeout(PATIENCE)
                ours.bind((CLIENT[version], port))
                ours.connect((CONTAINER[version], PORT))
            theirs = stack.enter_context(self.listeners[version].accept()[0])
            theirs.settimeout(PATIENCE)
            yield ours, theirs


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with contextlib.ExitStack() as stack:
        client, host, container = (stack.enter_context(Machine(tmp_path)) for _ in range(3))
        join(host, client)
        for version in (4, 6):
            host.run("sysctl", "-qw", f"net.ipv{version}.conf.all.forwarding=1")
        # addresses are there at once, so that no route comes while a test compares them
        host.run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
        host.run("ip", "link", "add", "br0", "type", "bridge")
        peer = ("peer", "name", "eth0", "netns", str(container.pid))
        host.run("ip", "link", "add", "port0", "master", "br0", "type", "veth", *peer)
        host.run("ip", "link", "set", "port0", "up")
        for machine, device, addresses in (
            (host, "br0", GATEWAY),
            (container, "eth0", CONTAINER),
        ):
            machine.run("ip", "link", "set", device, "up")
            for version, address in addresses.items():
                with_length = f"{address}/{LENGTH[version]}"
                extra = ("nodad",) if version == 6 else ()
                machine.run("ip", "addr", "add", with_length, "dev", device, *extra)
        listeners = {}
        for version, gateway in GATEWAY.items():
            container.run("ip", "route", "add", DEFAULT[version], "via", gateway)
            with container.network():
                at = (CONTAINER[version], PORT)
                listener = socket.create_server(at, family=FAMILY[version])
            listener.settimeout(PATIENCE)
            listeners[version] = stack.enter_context(listener)
        made = Lab(host, listeners)
        made.filters(DOCKERS_FILTERS)
        # a neighbour on a new bridge is not found at once
        for version in (4, 6):
            wait_for("a container that can be reached", lambda v=version: made.plain(v))
        yield made


def plumbing(priority: int = PRIORITY) -> Plumbing:
    return Plumbing(MARK, MASK, TABLE, priority)


@pytest.mark.parametrize("rp_filter", [0, 1, 2])
@pytest.mark.parametrize("version", [4, 6])
def test_the_backend_sees_the_client(lab: Lab, version: int, rp_filter: int) -> None:
    """
    Address and port are the client's, and bytes come and go, however the host checks sources.
    """
    for device in ("all", "br0"):
        lab.host.run("sysctl", "-qw", f"net.ipv4.conf.{device}.rp_filter={rp_filter}")
    with lab.router():
        plumbing().install()

    with lab.dial(version, 50123) as (ours, theirs):
        assert (CLIENT[version], 50123) == theirs.getpeername()[:2]
        ours.sendall(b"question")
        assert b"question" == theirs.recv(100)
        theirs.sendall(b"answer")
        assert b"answer" == ours.recv(100)


@pytest.mark.parametrize("version", [4, 6])
def test_checks_of_the_way_back_that_heed_marks_let_replies_pass(lab: Lab, version: int) -> None:
    """
    Neither wg-quick's src_valid_mark nor firewalld's reverse path filter takes a reply for forged.
    """
    for name in ("rp_filter", "src_valid_mark"):
        lab.host.run("sysctl", "-qw", f"net.ipv4.conf.all.{name}=1")
    lab.filters(REVERSE_PATH)
    with lab.router():
        plumbing().install()

    with lab.dial(version) as (_, theirs):
        assert CLIENT[version] == theirs.getpeername()[0]


@pytest.mark.parametrize("version", [4, 6])
def test_without_plumbing_no_reply_comes(lab: Lab, version: int) -> None:
    """
    It is the plumbing that brings the replies, so the other tests here can fail.
    """
    with pytest.raises(TimeoutError), lab.dial(version):
        pass


def test_what_is_torn_out_is_repaired_within_ten_seconds(lab: Lab) -> None:
    """
    Flushed filters and lost rules come back; it is told when they are gone, and when they are back.
    """
    told: list[tuple[bool, str]] = []
    with lab.router():
        laid = plumbing()
        laid.install()
        watch = Watch(laid, lambda ok, reason: told.append((ok, reason)))
        watch.start()
    try:
        lab.host.run("nft", "flush", "ruleset")
        lab.host.run("ip", "-6", "rule", "del", "priority", str(PRIORITY))
        lab.host.run("ip", "-4", "route", "flush", "table", str(TABLE))
        torn = time.monotonic()
        wait_for("a repair", lambda: (True, "") in told)
        took = time.monotonic() - torn
    finally:
        watch.stop()

    gone = f"gone: IPv4 route in table {TABLE}, IPv6 rule {PRIORITY}, nftables table inet sniroute"
    assert [(False, gone), (True, "")] == told
    assert took < 10
    for version in (4, 6):
        with lab.dial(version) as (_, theirs):
            assert CLIENT[version] == theirs.getpeername()[0]


def test_what_can_not_be_repaired_is_told_once(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    A rule that took our place is named, and not at every look; when it goes, all is well again.
    """
    monkeypatch.setattr("controller.router.plumbing.INTERVAL", 0.1)
    told: list[tuple[bool, str]] = []
    with lab.router():
        laid = plumbing()
        laid.install()
    lab.host.run("ip", "rule", "del", "priority", str(PRIORITY))
    lab.host.run("ip", "rule", "add", "priority", str(PRIORITY), "fwmark", "7", "table", "7")
    with lab.router():
        watch = Watch(laid, lambda ok, reason: told.append((ok, reason)))
        watch.start()
    try:
        wait_for("a second look", lambda: len(told) >= 2)
        lab.host.run("ip", "rule", "del", "priority", str(PRIORITY))
        wait_for("a repair", lambda: (True, "") in told)
    finally:
        watch.stop()

    taken = f"IPv4 rule {PRIORITY} (fwmark 0x7/0xffffffff) has the priority of ours: set another"
    assert [(False, f"gone: IPv4 rule {PRIORITY}"), (False, taken), (True, "")] == told


def test_a_connection_outlives_a_flush_and_a_repair(lab: Lab) -> None:
    """
    What was sent while the plumbing was gone arrives when it is back.
    """
    with lab.router():
        laid = plumbing()
        laid.install()
    with lab.dial(4) as (ours, theirs):
        lab.host.run("nft", "delete", "table", "inet", "sniroute")
        theirs.sendall(b"sent meanwhile")
        with lab.router():
            laid.install()
        ours.settimeout(10)

        assert b"sent meanwhile" == ours.recv(100)


def test_an_end_leaves_nothing(lab: Lab) -> None:
    """
    After remove() the host's filters, rules and routes are what they were, and again harmlessly.
    """
    before = lab.state()
    with lab.router():
        laid = plumbing()
        laid.install()
        laid.install()
        whole = laid.verify()
    during = lab.state()
    with lab.router():
        laid.remove()
        laid.remove()

    assert () == whole
    assert before != during
    assert before == lab.state()


def test_what_a_killed_router_left_is_harmless_and_replaced(lab: Lab) -> None:
    """
    Its leftovers disturb nobody, and the next router replaces them, other settings or not.
    """
    with lab.router():
        plumbing().install()
    expected = lab.state()
    with lab.router():
        plumbing().remove()
    killed = subprocess.Popen(
        lab.host.outside(sys.executable, "-c", FOREVER), cwd=REPOSITORY, stdout=subprocess.PIPE
    )
    with killed:
        said = killed.stdout.readline()
        killed.send_signal(signal.SIGKILL)
    left = lab.state()
    plain = lab.plain(4) and lab.plain(6)
    with lab.router():
        plumbing().install()

    assert plain
    assert b"up\n" == said
    assert any("proto 143" in text for text in left)
    assert expected == lab.state()


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        (
            f"ip -6 rule add priority {PRIORITY} fwmark 7 table 7",
            f"IPv6 rule {PRIORITY} (fwmark 0x7/0xffffffff) has the priority of ours",
        ),
        (
            "ip rule add priority 77 fwmark 0x40000000/0x60000000 table 7",
            "IPv4 rule 77 (fwmark 0x40000000/0x60000000) matches our mark 0x40000000",
        ),
        (
            f"ip route add 192.0.2.0/24 dev br0 table {TABLE}",
            f"table {TABLE} has IPv4 routes",
        ),
    ],
)
def test_what_is_in_the_way_is_named_and_left_alone(lab: Lab, command: str, complaint: str) -> None:
    """
    Another owner's rules and routes are neither changed nor worked around.
    """
    lab.host.run(*command.split())
    before = lab.state()

    with lab.router(), pytest.raises(PlumbingError) as caught:
        plumbing().install()

    assert f"{complaint}: set another" == str(caught.value)
    assert before == lab.state()


def test_a_neighbours_marks_are_no_conflict(lab: Lab) -> None:
    """
    The rules of Tailscale, wg-quick and Calico live beside ours.
    """
    for words in (
        "priority 5210 fwmark 0x80000/0xff0000 table main",
        "priority 5270 table 52",
        "priority 32765 not fwmark 0xca6c table 51820",
        "priority 99 not fwmark 0x100000/0x100000 table 1",
    ):
        lab.host.run("ip", "rule", "add", *words.split())

    with lab.router():
        plumbing().install()

    with lab.dial(4) as (_, theirs):
        assert CLIENT[4] == theirs.getpeername()[0]


def test_a_host_without_ipv6_has_ipv4(lab: Lab) -> None:
    """
    IPv4 alone works; IPv6 is said to be none, and is missed as soon as there is one.
    """
    lab.host.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    with lab.router():
        laid = plumbing()
        laid.install()

        assert () == laid.verify()
        assert (4,) == ip_versions()
        assert frozenset({4}) == read_network().families

    with lab.dial(4) as (_, theirs):
        assert CLIENT[4] == theirs.getpeername()[0]
    lab.host.run("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=0")
    with lab.router():
        assert f"IPv6 rule {PRIORITY}" in laid.verify()


def test_the_network_is_what_the_host_is_on(lab: Lab) -> None:
    """
    Every interface's address is known with its network.
    """
    with lab.router():
        found = {str(interface) for interface in read_network().interfaces}

    wanted = {f"{address}/{LENGTH[version]}" for version, address in GATEWAY.items()}
    assert wanted | {"203.0.113.1/30", "127.0.0.1/8", "::1/128"} <= found


def test_without_net_admin_it_says_so(lab: Lab) -> None:
    """
    Without the capability nothing is laid, and the reason is the kernel's.
    """
    with lab.router():
        few = pyprctl.CapState.get_current()
        none = pyprctl.CapState(set(), few.permitted, few.inheritable)
        none.set_current()
        with pytest.raises(PlumbingError, match=r"Operation not permitted|EPERM"):
            plumbing().install()


def test_a_mark_outside_its_mask_is_refused() -> None:
    """
    A mark that its mask can not show would match nothing.
    """
    with pytest.raises(PlumbingError, match="mark 0x3: must be some of the bits of mask 0x1"):
        Plumbing(3, 1, TABLE, PRIORITY)
