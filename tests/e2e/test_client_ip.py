"""
The client's own address in the logs of real containers, or the reason why it is not there.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from docker.types import IPAMConfig, IPAMPool
from harness import fetch
from harness.engines import Daemon, Engine
from harness.lab import LATE, PROMPT, access_line
from harness.machines import CLIENT_ADDRESS, Here
from harness.product import Sniroute, privileges
from harness.tools import wait_for
from harness.witness import Seen, Witness

HOST = "witness.example.test"

CLIENT6 = "2001:db8:0:9::2"
FRONT6 = "2001:db8:0:9::1"

NET_ADMIN = 1 << 12

RunWitness = Callable[..., Witness]


@dataclass(frozen=True, slots=True)
class Networks:
    """
    Networks of the engine: *dual* has IPv6 too, *closed* is internal.
    """

    dual: Any
    other: Any
    closed: Any


@pytest.fixture(scope="module")
def networks(engine: Engine) -> Iterator[Networks]:
    """
    Make the networks, and give the two machines IPv6; sources are checked strictly everywhere.
    """
    for device in ("all", "default"):
        engine.host.run("sysctl", "-qw", f"net.ipv4.conf.{device}.rp_filter=1")
    for machine, device, address in (
        (engine.host, "out0", FRONT6),
        (engine.client, "eth0", CLIENT6),
    ):
        machine.run("ip", "addr", "replace", f"{address}/64", "dev", device, "nodad")
    made = []
    for name, options, *subnets in (
        ("dual", {"enable_ipv6": True}, "198.18.66.0/24", "2001:db8:0:66::/64"),
        ("other", {}, "198.18.67.0/24"),
        ("closed", {"internal": True}, "198.18.68.0/24"),
    ):
        ipam = IPAMConfig(pool_configs=[IPAMPool(subnet=subnet) for subnet in subnets])
        made.append(engine.api.networks.create(name, driver="bridge", ipam=ipam, **options))
    yield Networks(*made)
    for network in made:
        network.remove()


@pytest.fixture
def run_witness(engine: Engine) -> Iterator[RunWitness]:
    """
    Run witnesses that are gone after the test.
    """
    witnesses = []

    def run(*args: Any, **options: Any) -> Witness:
        witnesses.append(Witness.run(engine, *args, **options))
        return witnesses[-1]

    yield run
    for witness in witnesses:
        witness.remove()


@pytest.fixture
def sniroute(engine: Engine, networks: Networks) -> Iterator[Sniroute]:  # noqa: ARG001 - there before it
    """
    The product on the engine's machine, reached by IPv6 too.
    """
    flags = ("--listen", f"[{FRONT6}]:443", "--transparent-timeout", str(LATE))
    with Sniroute(engine, "--engine", engine.url, *flags) as sniroute:
        yield sniroute


def ask(
    engine: Engine, *witnesses: Witness, host: str = HOST, machine: Here | None = None, at: str = ""
) -> Seen:
    """
    Fetch *host* through the product, and return the address and port that this client had.
    """
    began = time.monotonic()
    to = at or engine.front[0], 443
    root = "".join(witness.root for witness in witnesses)
    with fetch.connect(machine or engine.client, to, host, root) as sock:
        fetch.get(sock, host)
        client = sock.getsockname()[:2]
    assert time.monotonic() - began < PROMPT
    return client


def expect_seen(witness: Witness, client: Seen) -> None:
    """
    Wait until *witness* has *client* in its log.
    """
    wait_for(f"{client} in the log", lambda: client in witness.seen())


def expect_plain(sniroute: Sniroute, client: Seen, reason: str) -> None:
    """
    Check that *client* was served from the host's own address, for *reason*.
    """
    line = access_line(sniroute, client)

    assert ("nat", reason) == (line["client_ip"], line["client_ip_reason"])


def test_the_containers_own_log_has_the_client(
    daemon: Daemon, engine: Engine, networks: Networks, sniroute: Sniroute, run_witness: RunWitness
) -> None:
    """
    Each container of a pool logs the client's address and port, whatever has been restarted.

    The router has no more than the capability for that.
    """
    pool = [
        run_witness({"sniroute.host": HOST}, networks.dual, name=name) for name in ("one", "two")
    ]

    def expect_all_seen() -> None:
        sniroute.wait_for_route(HOST, *(witness.address() for witness in pool))
        clients = [ask(engine, *pool) for _ in pool]
        assert {CLIENT_ADDRESS} == {address for address, _ in clients}
        wait_for("each in one log", lambda: all(len({*w.seen()} & {*clients}) == 1 for w in pool))

    expect_all_seen()

    pool[1].container.restart(timeout=2)
    pool[1].wait_until_serving(HOST)
    expect_all_seen()

    daemon.kill()
    sniroute.wait_for_status("engine away", lambda s: not s["engines"][0]["connected"])
    daemon.start()
    sniroute.wait_for_status("engine back", lambda s: s["engines"][0]["connected"])
    expect_all_seen()

    killed = sniroute.router()
    killed.kill()
    wait_for("another router", lambda: sniroute.router() != killed)
    wait_for("a table", lambda: sniroute.metric("sniroute_table_generation"))
    expect_all_seen()

    sets = privileges(sniroute.router())
    assert (NET_ADMIN, NET_ADMIN) == (sets["CapPrm"], sets["CapEff"])


def test_a_container_with_two_families_sees_clients_of_both(
    engine: Engine, networks: Networks, sniroute: Sniroute, run_witness: RunWitness
) -> None:
    """
    The one label has IPv6 clients led to the container's IPv6 address, and IPv4 ones to the other.
    """
    witness = run_witness({"sniroute.host": HOST}, networks.dual)
    sniroute.wait_for_route(HOST, witness.address())

    for at, own, key in (
        (engine.front[0], CLIENT_ADDRESS, "IPAddress"),
        (FRONT6, CLIENT6, "GlobalIPv6Address"),
    ):
        client = ask(engine, witness, at=at)
        line = access_line(sniroute, client)

        assert own == client[0]
        expect_seen(witness, client)
        assert ("packet", "transparent", witness.address(networks.dual, key)) == (
            line["handoff"],
            line["client_ip"],
            line["backend_address"],
        )


def test_a_container_in_two_networks_is_served_by_each(
    engine: Engine, networks: Networks, sniroute: Sniroute, run_witness: RunWitness
) -> None:
    """
    Since replies may leave by either network, both are reached from the host's address, at once.
    """
    hosts = {f"{n.name}.example.test": n for n in (networks.dual, networks.other)}
    labels = {f"sniroute.{n.name}.host": host for host, n in hosts.items()}
    labels |= {f"sniroute.{n.name}.network": n.name for n in hosts.values()}
    witness = run_witness(labels, *hosts.values(), sites=[*hosts])

    for host, network in hosts.items():
        sniroute.wait_for_route(host, witness.address(network))
        expect_plain(sniroute, ask(engine, witness, host=host), "several_networks")


def test_a_container_that_the_world_can_not_reach_is_served(
    engine: Engine, networks: Networks, sniroute: Sniroute, run_witness: RunWitness
) -> None:
    """
    A container of an internal network has no way back to strangers, and is reached all the same.
    """
    witness = run_witness({"sniroute.host": HOST}, networks.closed)
    sniroute.wait_for_route(HOST, witness.address())

    expect_plain(sniroute, ask(engine, witness), "internal_network")


def test_neighbours_and_the_host_are_served(
    engine: Engine, networks: Networks, sniroute: Sniroute, run_witness: RunWitness
) -> None:
    """
    Containers on the same bridge and on another, the container itself and its host get an answer.

    What leaves for another bridge is masqueraded by the engines, so there is nothing to lend.
    """
    witness = run_witness({"sniroute.host": HOST}, networks.dual)
    neighbour = run_witness({}, networks.dual, name="neighbour", sites=["n.example.test"])
    stranger = run_witness({}, networks.other, name="stranger", sites=["s.example.test"])
    sniroute.wait_for_route(HOST, witness.address())

    for machine, reason in (
        (neighbour.inside(), "same_network"),
        (witness.inside(), "same_network"),
        (stranger.inside(), "container_network"),
        (engine.host, "own_host"),
    ):
        expect_plain(sniroute, ask(engine, witness, machine=machine), reason)

    # one more fetched at the start
    seen = wait_for("all five in the log", lambda: len(x := witness.seen()) == 5 and x)
    assert {witness.address(networks.dual, "Gateway")} == {address for address, _ in seen}


@pytest.fixture
def lan(engine: Engine) -> Iterator[Any]:
    """
    Have a macvlan network, which the host reaches by a foot of its own in it.
    """
    ip = ("ip", "link")
    engine.host.run(*ip, "add", "lan0", "type", "veth", "peer", "name", "lan1")
    engine.host.run(*ip, "add", "foot", "link", "lan0", "type", "macvlan", "mode", "bridge")
    engine.host.run("ip", "addr", "add", "198.18.69.250/24", "dev", "foot")
    for device in ("lan0", "lan1", "foot"):
        engine.host.run(*ip, "set", device, "up")
    pool = IPAMPool(subnet="198.18.69.0/24", iprange="198.18.69.0/28", gateway="198.18.69.254")
    network = engine.api.networks.create(
        "lan", driver="macvlan", options={"parent": "lan0"}, ipam=IPAMConfig(pool_configs=[pool])
    )
    yield network
    network.remove()
    for device in ("foot", "lan0"):
        engine.host.run(*ip, "del", device)


def test_a_container_on_a_macvlan_is_served(
    engine: Engine, lan: Any, sniroute: Sniroute, run_witness: RunWitness
) -> None:
    """
    The replies of a container on the LAN leave by the LAN's own gateway, so nothing is lent.
    """
    witness = run_witness({"sniroute.host": HOST, "sniroute.network": "lan"}, lan)
    sniroute.wait_for_route(HOST, witness.address())

    expect_plain(sniroute, ask(engine, witness), "macvlan")
