"""
Backends see the client's own address, or the log says why not, and nobody waits for long.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pytest
from harness import fetch, swarm, webservers
from harness.ends import client_hello
from harness.lab import (
    ANYWHERE,
    CLIENT,
    EDGE,
    FRONT,
    LATE,
    PROMPT,
    Answer,
    Container,
    Lab,
    RefusedError,
    access_line,
    gateway,
    route,
)
from harness.operate import ask
from harness.product import Sniroute, privileges
from harness.tools import wait_for

from controller.core.alert import INTERNAL_ERROR
from controller.core.proxyprotocol import Version, write_header
from controller.core.routes import Backend, Route, RouteTable
from controller.core.wire import dump_table, read_routes

NET_ADMIN = 1 << 12

APPS = [(4, "app.test"), (6, "app6.test")]
"""The IP version of each host's backend."""


@dataclass(frozen=True, slots=True)
class House:
    """
    A lab with containers, and the product in front of them.
    """

    lab: Lab
    app: Container
    neighbour: Container
    stray: Container
    stranger: Container
    web: webservers.WebServers
    sniroute: Sniroute

    def fetch(
        self, host: str, server: str, version: int = 4, at: tuple[str, int] | None = None
    ) -> tuple[str, int]:
        """
        Fetch from *host*, and return the address and port that the client had.

        Waits until *server* has them in its log.
        """
        before = len(self.web.seen(server))
        to = at or (FRONT[version], 443)
        with fetch.connect(self.lab.world, to, host, self.web.root) as sock:
            assert fetch.get(sock, host) == b"ok"
            client = sock.getsockname()[:2]
        wait_for(f"{client} in the log", lambda: client in self.web.seen(server)[before:])
        return client


@dataclass(frozen=True, slots=True)
class Dual:
    """
    A lab with a container, and the product in front of it.
    """

    lab: Lab
    app: Container
    sniroute: Sniroute

    def serve(self, address6: str) -> None:
        """
        Have the router know *address6* too, as of a container; static routes have one address.
        """
        backend = Backend("app", "lab", self.app.address[4], 443, address6=address6)
        push(self.lab, [Route("app.test", (backend,))])

    def expect_plain(self, answer: Answer, reason: str) -> None:
        """
        Check that *answer* came from the IPv4 address, to the host's own, for *reason*.
        """
        line = access_line(self.sniroute, answer.client)

        assert gateway(4) == answer.seen[0]
        assert ("nat", reason) == (line["client_ip"], line["client_ip_reason"])
        assert self.app.address[4] == line["backend_address"]

    def told(self) -> list[tuple[str, str]]:
        """
        Read from the log which backends do not see their clients, and why.
        """
        lines = self.sniroute.log()
        return [
            (line["backend"], line["reason"])
            for line in lines
            if line["event"] == "client address not passed on"
        ]


def push(lab: Lab, routes: Iterable[Route], networks: Iterable[str] = ()) -> None:
    """
    Give the router a table, as a controller with an engine has it.
    """
    table = {"type": "table", **dump_table(RouteTable(1000, routes, networks))}
    (answer,) = ask(lab.share / "router.sock", table)
    assert {"type": "ack", "generation": 1000} == answer


def tell_networks(lab: Lab) -> None:
    """
    Have the router know the networks of both bridges, beside the routes that it has.
    """
    (told,) = ask(lab.share / "router.sock", {"type": "routes"})
    nets = [f"198.18.{n}.0/24" for n in (1, 2)] + [f"2001:db8:0:{n}::/64" for n in (1, 2)]
    push(lab, read_routes(told["routes"]), nets)


PLAIN_HOSTS = {4: "web.test", 6: "web6.test"}

TOLD_HOSTS = [
    f"{version}.{client_ip}.{server}.test"
    for version in ("v1", "v2")
    for client_ip in ("auto", "nat")
    for server in webservers.PORTS
]
"""Hosts whose backends are told of the client by a PROXY header, too or only."""


def write_routes(app: Container, stray: Container, web: Container) -> str:
    routes = [
        route("app.test", app.address[4]),
        route("app6.test", app.address[6]),
        route("nat.test", app.address[4], client_ip="nat"),
        route("must.test", app.address[4], client_ip="transparent"),
        route("stray.test", stray.address[4]),
        route("must.stray.test", stray.address[4], client_ip="transparent"),
    ]
    for version, host in PLAIN_HOSTS.items():
        routes.append(route(host, web.address[version], webservers.PLAIN))
    for host in TOLD_HOSTS:
        version, client_ip, server, _ = host.split(".")
        keys = {"proxy_protocol": version, "client_ip": client_ip}
        routes.append(route(host, web.address[4], webservers.PORTS[server], **keys))
    return "".join(routes)


def lead_astray(container: Container, elsewhere: Container) -> None:
    """
    Have *container* send all that is not for its own network *elsewhere*, where it is dropped.
    """
    elsewhere.run("sysctl", "-qw", "net.ipv4.ip_forward=0")
    container.run("ip", "route", "replace", "default", "via", elsewhere.address[4])


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    """
    Two containers, and a third one whose replies to strangers go nowhere.
    """
    with Lab() as lab, contextlib.ExitStack() as stack:
        app, neighbour, stray, web = (lab.container(number) for number in (2, 3, 4, 5))
        lead_astray(stray, neighbour)
        lab.bridge(2)
        stranger = lab.container(6, bridge=2)
        lab.witness(app)
        lab.witness(stray)
        hosts = [*PLAIN_HOSTS.values(), *TOLD_HOSTS]
        servers = webservers.serving(web, web.address[4], lab.share, hosts)
        running = stack.enter_context(servers)
        routes = write_routes(app, stray, web)
        options = ("--connect-timeout", "2", "--proxy-protocol-from", EDGE)
        sniroute = stack.enter_context(lab.product(*options, routes=routes))
        tell_networks(lab)
        yield House(lab, app, neighbour, stray, stranger, running, sniroute)


@pytest.fixture
def lab() -> Iterator[Lab]:
    """
    A lab of the test's own.
    """
    with Lab() as lab:
        yield lab


def expect_plain(house: House, answer: Answer, reason: str, version: int = 4) -> None:
    """
    Check that *answer* came over a connection from the host's own address, promptly, for *reason*.
    """
    line = access_line(house.sniroute, answer.client)

    assert gateway(version) == answer.seen[0]
    assert ("nat", reason) == (line["client_ip"], line["client_ip_reason"])
    assert answer.seconds < PROMPT


# --- seen ---


@pytest.mark.parametrize("rp_filter", [0, 1, 2])
@pytest.mark.parametrize(("version", "name"), APPS)
def test_the_backend_sees_the_client(house: House, version: int, name: str, rp_filter: int) -> None:
    """
    Address and port are the client's, however the host checks the sources of packets.
    """
    house.lab.check_sources(rp_filter)
    try:
        answer = house.lab.ask(name, version)
    finally:
        house.lab.check_sources(1)
    line = access_line(house.sniroute, answer.client)

    assert CLIENT[version] == answer.client[0]
    assert answer.client == answer.seen
    assert "transparent" == line["client_ip"]
    assert "client_ip_reason" not in line


def test_a_port_that_the_router_needs_itself_is_replaced(house: House) -> None:
    """
    A client whose port is one that the router listens on everywhere is seen with another.
    """
    answer = house.lab.ask("app.test", source=(CLIENT[4], ANYWHERE))

    assert (CLIENT[4], ANYWHERE) == answer.client
    assert CLIENT[4] == answer.seen[0]
    assert ANYWHERE != answer.seen[1]


# --- not seen, and why ---


@pytest.mark.parametrize(("version", "name"), APPS)
def test_a_client_beside_the_backend_is_served_plainly(
    house: House, version: int, name: str
) -> None:
    """
    A container on the backend's own bridge gets an answer: the backend would reply past us.
    """
    answer = house.lab.ask(name, version, machine=house.neighbour)

    expect_plain(house, answer, "same_network", version)


@pytest.mark.parametrize(("version", "name"), APPS)
def test_a_client_on_another_bridge_is_served(house: House, version: int, name: str) -> None:
    """
    A container of another network gets an answer at once; engines masquerade and drop there.
    """
    answer = house.lab.ask(name, version, machine=house.stranger)

    assert house.stranger.address[version] == answer.client[0]
    expect_plain(house, answer, "container_network", version)


def test_a_neighbour_is_known_as_soon_as_its_network(lab: Lab) -> None:
    """
    A client that is there first, on a network as new as the backend, is served at once.
    """
    file = lab.share / "routes.toml"
    with lab.product(routes=route("other.test", gateway(4))) as sniroute:
        lab.bridge(2)
        app, neighbour = lab.container(2, bridge=2), lab.container(3, bridge=2)
        lab.witness(app)
        file.write_text(route("app.test", app.address[4]))
        sniroute.wait_for_route("app.test", app.address[4])
        first = lab.ask("app.test", machine=neighbour)
        second = lab.ask("app.test")

        assert "same_network" == access_line(sniroute, first.client)["client_ip_reason"]
        assert first.seconds < PROMPT
        assert second.client == second.seen


def test_a_backend_may_call_itself(house: House) -> None:
    """
    A container that reaches its own name through the router gets an answer.
    """
    answer = house.lab.ask("app.test", machine=house.app)

    expect_plain(house, answer, "same_network")


@pytest.mark.parametrize(("version", "name"), APPS)
def test_a_client_on_the_host_is_served_plainly(house: House, version: int, name: str) -> None:
    """
    The host's own address can not be borrowed, it is taken.
    """
    answer = house.lab.ask(name, version, machine=house.lab.host)

    expect_plain(house, answer, "own_host", version)


@pytest.mark.parametrize(("version", "name", "backend"), [(6, "app.test", 4), (4, "app6.test", 6)])
def test_a_client_of_the_other_family_is_served_plainly(
    house: House, version: int, name: str, backend: int
) -> None:
    """
    An IPv6 client of an IPv4 backend, or the other way round, gets an answer.
    """
    answer = house.lab.ask(name, version)

    expect_plain(house, answer, "family", backend)


def test_nat_is_for_who_asks_for_it(house: House) -> None:
    """
    A route with client-ip nat has a backend that sees the host.
    """
    expect_plain(house, house.lab.ask("nat.test"), "nat")


def test_a_backend_whose_replies_go_astray_costs_one_client_a_second(lab: Lab) -> None:
    """
    The first client waits for one short timeout, the next ones not at all, until it changes.
    """
    app, stray = lab.container(2), lab.container(4)
    lab.witness(stray)
    lead_astray(stray, elsewhere=app)
    other, astray = route("app.test", app.address[4]), route("stray.test", stray.address[4])
    with lab.product(routes=other + astray) as sniroute:
        first, second = lab.ask("stray.test"), lab.ask("stray.test")
        stray.run("ip", "route", "replace", "default", "via", gateway(4))
        third = lab.ask("stray.test")
        for text, served in ((other, {"app.test"}), (other + astray, {"app.test", "stray.test"})):
            (lab.share / "routes.toml").write_text(text)
            wait_for("new routes", lambda served=served: sniroute.routes().keys() == served)
        fourth = lab.ask("stray.test")
        lines = [access_line(sniroute, a.client) for a in (first, second, third, fourth)]
        told = [x for x in sniroute.log() if x["event"] == "client address not passed on"]

        assert ["nat", "nat", "nat", "transparent"] == [x["client_ip"] for x in lines]
        assert 3 * ["no_reply"] == [x["client_ip_reason"] for x in lines[:3]]
        assert 3 * [gateway(4)] == [a.seen[0] for a in (first, second, third)]
        assert LATE < first.seconds < LATE + PROMPT
        assert max(second.seconds, third.seconds) < PROMPT
        assert fourth.client == fourth.seen
        assert [("198.18.1.4:443", "no_reply")] == [(x["backend"], x["reason"]) for x in told]
        counts = {
            reason: sniroute.metric("sniroute_backend_connects_total", reason=reason)
            for reason in ("no_reply", "")
        }
        assert {"no_reply": 3, "": 1} == counts


# --- two families ---


@pytest.fixture
def dual(lab: Lab) -> Iterator[Dual]:
    """
    The product with a route `app.test`, whose one backend is a container with both families.
    """
    app = lab.container(2)
    lab.witness(app)
    with lab.product(routes=route("other.test", gateway(4))) as sniroute:
        yield Dual(lab, app, sniroute)


def test_each_client_is_led_to_its_own_family(dual: Dual) -> None:
    """
    A backend with two addresses sees IPv4 and IPv6 clients, each at the one of its family.
    """
    dual.serve(dual.app.address[6])

    for version in (4, 6):
        answer = dual.lab.ask("app.test", version)
        line = access_line(dual.sniroute, answer.client)

        assert CLIENT[version] == answer.client[0]
        assert answer.client == answer.seen
        assert dual.app.address[version] == line["backend_address"]


def test_a_second_address_where_nothing_listens_costs_nothing(dual: Dual) -> None:
    """
    Clients of the family at which a backend refuses are served at the other one, at once.
    """
    deaf = gateway(6) + "22"
    dual.app.run("ip", "addr", "add", f"{deaf}/64", "dev", "eth0", "nodad")
    dual.serve(deaf)

    for _ in range(2):
        dual.expect_plain(dual.lab.ask("app.test", 6), "family")
    answer = dual.lab.ask("app.test")

    assert answer.client == answer.seen
    assert [("app", "family")] == dual.told()


def test_a_second_address_without_a_way_back_costs_one_client_a_second(dual: Dual) -> None:
    """
    What was learned of one family says nothing of the other.
    """
    dual.app.run("ip", "-6", "route", "del", "default")
    dual.serve(dual.app.address[6])

    seen = dual.lab.ask("app.test")
    first, second = (dual.lab.ask("app.test", 6) for _ in range(2))

    assert seen.client == seen.seen
    dual.expect_plain(first, "no_reply")
    dual.expect_plain(second, "no_reply")
    assert LATE < first.seconds < LATE + PROMPT
    assert second.seconds < PROMPT
    assert [("app", "no_reply")] == dual.told()


def test_beside_a_backend_of_two_families_its_first_address_is_dialled(dual: Dual) -> None:
    """
    An IPv6 neighbour gets an ordinary connection, and those go where a server listens for sure.
    """
    dual.serve(dual.app.address[6])

    dual.expect_plain(dual.lab.ask("app.test", 6, machine=dual.lab.container(3)), "same_network")


@pytest.mark.parametrize(
    ("name", "version", "seconds"), [("must.test", 6, 0), ("must.stray.test", 4, 2)]
)
def test_who_must_see_the_client_is_reached_as_the_client_or_not_at_all(
    house: House, name: str, version: int, seconds: float
) -> None:
    """
    With client-ip transparent, what can not be transparent is refused with internal_error.
    """
    assert house.lab.ask("must.test").seen[0] == CLIENT[4]

    began = time.monotonic()
    with pytest.raises(RefusedError, match=f"^{INTERNAL_ERROR}$"):
        house.lab.ask(name, version)

    assert seconds <= time.monotonic() - began < seconds + PROMPT


# --- as web servers tell it ---


@pytest.mark.parametrize("version", [4, 6])
def test_a_web_server_logs_the_client(house: House, version: int) -> None:
    """
    The client's address and port are in nginx's own log.
    """
    client = house.fetch(PLAIN_HOSTS[version], "plain", version)

    assert CLIENT[version] == client[0]


@pytest.mark.parametrize("host", TOLD_HOSTS)
def test_a_web_server_is_told_of_the_client(house: House, host: str) -> None:
    """
    nginx, HAProxy and Caddy take both versions of the header, from the client's address or ours.
    """
    _, client_ip, server, _ = host.split(".")
    client = house.fetch(host, server)
    line = access_line(house.sniroute, client, server_name=host)

    assert CLIENT[4] == client[0]
    assert {"auto": "transparent", "nat": "nat"}[client_ip] == line["client_ip"]


@pytest.mark.parametrize("server", webservers.PORTS)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_header_tells_what_an_address_can_not(house: House, version: str, server: str) -> None:
    """
    An IPv6 client of an IPv4 backend is in the backend's log, by its header.
    """
    client = house.fetch(f"{version}.auto.{server}.test", server, 6)
    line = access_line(house.sniroute, client)

    assert CLIENT[6] == client[0]
    assert ("nat", "family") == (line["client_ip"], line["client_ip_reason"])


@pytest.mark.parametrize("version", webservers.SENDERS)
@pytest.mark.parametrize(
    ("host", "server"),
    [("web.test", "plain"), *((f"v2.auto.{s}.test", s) for s in webservers.PORTS)],
)
def test_a_trusted_senders_client_is_the_client(
    house: House, version: str, host: str, server: str
) -> None:
    """
    Behind HAProxy with send-proxy or send-proxy-v2 the backend sees HAProxy's own client.
    """
    lab = house.lab
    with webservers.sending(lab.world, CLIENT[4], EDGE, FRONT[4], lab.share):
        client = house.fetch(host, server, at=(CLIENT[4], webservers.SENDERS[version]))
    line = access_line(house.sniroute, client, server_name=host, sender=EDGE)

    assert CLIENT[4] == client[0]
    assert "transparent" == line["client_ip"]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_spoofed_header_is_refused(house: House, version: Version) -> None:
    """
    A header from an address that is not trusted is not TLS, and reaches no backend.
    """
    victim, here = ("192.0.2.66", 4321), (FRONT[4], 443)
    header = write_header(version, victim, here, authority=None, alpn=None)
    port = {"v1": 47001, "v2": 47002}[version]

    with pytest.raises(RefusedError, match=r"^0$"):
        house.lab.ask("app.test", before=header, source=(CLIENT[4], port))

    line = access_line(house.sniroute, (CLIENT[4], port))
    assert "not_tls" == line["result"]
    assert "backend" not in line


# --- the plumbing ---


def test_off_lays_nothing_and_needs_nothing(lab: Lab) -> None:
    """
    With --client-ip off, and none of the packet hand-off, the router has no capability at all.
    """
    app = lab.container(2)
    lab.witness(app)
    before = lab.state()
    must = route("must.test", app.address[4], client_ip="transparent")
    routes = route("app.test", app.address[4]) + must
    with lab.product("--client-ip", "off", "--handoff", "sockmap", routes=routes) as sniroute:
        sets = privileges(sniroute.router())
        answer = lab.ask("app.test")
        with pytest.raises(RefusedError, match=f"^{INTERNAL_ERROR}$"):
            lab.ask("must.test")

        assert before == lab.state()
        assert gateway(4) == answer.seen[0]
        assert "off" == access_line(sniroute, answer.client)["client_ip_reason"]
        assert (0, 0, 0, 0) == tuple(sets[x] for x in ("CapPrm", "CapEff", "CapInh", "CapAmb"))


def test_the_plumbing_comes_and_goes_with_the_router(lab: Lab) -> None:
    """
    A clean stop leaves nothing; what a kill leaves is taken over by the next router.

    While it serves a router has CAP_NET_ADMIN and none else.
    """
    app = lab.container(2)
    lab.witness(app)
    routes = route("app.test", app.address[4])
    before = lab.state()
    killed = lab.product(routes=routes)
    try:
        sets = privileges(killed.router())
        lab.ask("app.test")
        laid = lab.state()
    finally:
        killed.kill()
    left = lab.state()
    with lab.product(routes=routes) as sniroute:
        adopted = lab.state()
        answer = lab.ask("app.test")
        works = sniroute.metric("sniroute_transparency_working")
    after = lab.state()

    assert (NET_ADMIN, NET_ADMIN, 0, 0) == tuple(
        sets[x] for x in ("CapPrm", "CapEff", "CapInh", "CapAmb")
    )
    assert before != laid
    assert laid == left
    assert laid == adopted
    assert answer.client == answer.seen
    assert 1 == works
    assert before == after


def test_a_replaced_router_leaves_the_plumbing_to_its_successor(lab: Lab) -> None:
    """
    When a replaced router ends, its successor's backends still see their clients.

    One that is replaced by a router without plumbing takes its own away.
    """
    app = lab.container(2)
    lab.witness(app)
    routes = route("app.test", app.address[4])
    before = lab.state()
    first = lab.product(routes=routes)
    laid = lab.state()
    second = lab.product("--replace", routes=routes)
    first.wait_for_end()
    left = lab.state()
    answer = lab.ask("app.test")
    with lab.product("--replace", "--client-ip", "off", routes=routes):
        second.wait_for_end()
        after = lab.state()
        plain = lab.ask("app.test")

    assert before != laid
    assert laid == left
    assert answer.client == answer.seen
    assert before == after
    assert gateway(4) == plain.seen[0]


def test_flushed_filters_cost_a_second_until_they_are_back(lab: Lab) -> None:
    """
    After `nft flush ruleset` every client is still answered, and within 10 s seen again.
    """
    app = lab.container(2)
    lab.witness(app)
    with lab.product(routes=route("app.test", app.address[4])) as sniroute:
        whole = lab.ask("app.test")
        lab.host.run("nft", "flush", "ruleset")
        flushed = time.monotonic()
        meanwhile = [lab.ask("app.test")]
        while meanwhile[-1].seen[0] != CLIENT[4] and time.monotonic() < flushed + 20:
            meanwhile.append(lab.ask("app.test"))
        took = time.monotonic() - flushed
        again = lab.ask("app.test")
        told = [x["working"] for x in sniroute.log() if x["event"] == "transparency"]

    assert whole.client == whole.seen
    assert gateway(4) == meanwhile[0].seen[0]
    assert max(answer.seconds for answer in meanwhile) < LATE + PROMPT
    assert took < 10
    assert again.client == again.seen
    assert [True, False, True] == told


def test_no_port_runs_out(lab: Lab) -> None:
    """
    64,000 quick connections from one address are all seen with address and port; none is left.

    They come from 40,000 ports, whoever closes first, some again while the last connection from
    their port is in TIME_WAIT at the router or at the backend.
    """
    app = lab.container(2)
    # a client that closes first may use its own ports again after a second
    lab.world.run("sysctl", "-qw", "net.ipv4.tcp_tw_reuse=1")
    runs = (
        (1443, range(10000, 30000)),
        (1443, range(10000, 30000)),
        (2443, range(30000, 50000)),
        (2443, range(30000, 34000)),
    )
    routes = "".join(route(f"p{port}.test", app.address[4], port) for port in (1443, 2443))
    with (
        swarm.serving(app, app.address[4], 1443, closes_first=True),
        swarm.serving(app, app.address[4], 2443, closes_first=False),
        lab.product("--no-access-log", routes=routes) as sniroute,
    ):
        router = sniroute.router()
        before = router.num_fds()
        tallies = [
            swarm.ask(lab.world, lab.front, client_hello(f"p{port}.test"), CLIENT[4], ports)
            for port, ports in runs
        ]
        wait_for("all connections over", lambda: router.num_fds() == before)
        open_sockets = lab.host.run("ss", "-Htan", "state", "connected", "exclude", "time-wait")
        seen = sniroute.metric("sniroute_backend_connects_total", client_ip="transparent")
        plain = sniroute.metric("sniroute_backend_connects_total", client_ip="nat")
        errors = sniroute.metric("sniroute_backend_connect_errors_total")

    assert [swarm.Tally(len(ports), 0, 0, 0, "") for _, ports in runs] == tallies
    assert (64000, 0, 0) == (seen, plain, errors)
    assert "" == open_sockets
