"""
The plan: ports, networks, pools, and that neither order nor neighbours matter.
"""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.core.plan import (
    Changes,
    Container,
    Network,
    Published,
    addresses,
    carry,
    diff,
    plan,
    pool,
)
from controller.core.problems import Severity
from controller.core.routes import Backend, Detour, Route


def net(name: str = "web", address: str = "198.51.100.2", **changes: object) -> Network:
    network = Network(name, address, "", "bridge", reachable=True, gateway="198.51.100.1")
    return replace(network, **changes)


def box(name: str = "app", *networks: Network, **changes: object) -> Container:
    container = Container(
        id=f"id-{name}",
        name=name,
        source="docker",
        labels={"sniroute.host": "app.example.com"},
        ports=frozenset({443}),
        networks=networks or (net(),),
        mode="web",
    )
    return replace(container, **changes)


def labels(**values: str) -> dict[str, str]:
    return {f"sniroute.{key}": value for key, value in values.items()}


def only_backend(container: Container, *others: Container, network: str | None = None) -> Backend:
    (route,) = plan([container, *others], (), network).routes
    (backend,) = route.backends
    return backend


def codes(container: Container, *others: Container, network: str | None = None) -> list[str]:
    return [p.code.value for p in plan([container, *others], (), network).problems]


@pytest.mark.parametrize(
    ("label", "exposed", "port"),
    [
        ("8443", {443, 80}, 8443),
        ("8443", set(), 8443),
        (None, {8443}, 8443),
        (None, {80, 443, 8443}, 443),
    ],
)
def test_port_is_the_label_else_the_only_one_else_443(
    label: str | None, exposed: set[int], port: int
) -> None:
    """
    The port's order of preference.
    """
    wanted = {"port": label} if label else {}
    container = box(labels=labels(host="a.example.com", **wanted), ports=frozenset(exposed))

    assert port == only_backend(container).port


@pytest.mark.parametrize(("exposed", "code"), [(set(), "no-port"), ({80, 8443}, "ambiguous-port")])
def test_port_is_never_guessed(exposed: set[int], code: str) -> None:
    """
    Without a port that is certain there is a problem and no route.
    """
    result = plan([box(ports=frozenset(exposed))])

    assert () == result.routes
    assert [code] == [p.code.value for p in result.problems]


def test_network_is_the_label_before_all() -> None:
    """
    The label wins over the configured network, even where reachability says no.
    """
    networks = net("a"), net("b", "198.51.100.3", reachable=False)
    container = box("app", *networks, labels=labels(host="a.example.com", network="b"))

    assert "198.51.100.3" == only_backend(container, network="a").address
    assert [] == codes(container, network="a")


def test_configured_network_decides_only_for_containers_in_it() -> None:
    """
    The configured network is a preference; a container elsewhere is still reached.
    """
    inside = box("app", net("a"), net("b", "198.51.100.3"))
    outside = box("app", net("a"))

    assert "198.51.100.3" == only_backend(inside, network="b").address
    assert "198.51.100.2" == only_backend(outside, network="b").address


def test_only_reachable_network_is_taken_without_a_word() -> None:
    """
    Networks that can not be reached do not count.
    """
    container = box("app", net("a", reachable=False), net("b", "198.51.100.3"))

    assert "198.51.100.3" == only_backend(container).address
    assert [] == codes(container)


def test_several_reachable_networks_are_warned_of() -> None:
    """
    The first by name is taken, and a warning says so.
    """
    container = box("app", net("b", "198.51.100.3"), net("a"))

    assert "198.51.100.2" == only_backend(container).address
    (problem,) = plan([container]).problems
    assert ("ambiguous-network", Severity.WARNING) == (problem.code, problem.severity)
    assert "a, b" in problem.detail


@pytest.mark.parametrize("name", ["web", "shop_web"])
def test_network_is_named_with_or_without_its_project(name: str) -> None:
    """
    `web` names the network web, else the one that compose called PROJECT_web.
    """
    container = box("app", net(name), labels=labels(host="a.example.com", network="web"))

    assert "198.51.100.2" == only_backend(container).address


FAR = net(reachable=False)
NAMED = labels(host="a.example.com", network="web")


@pytest.mark.parametrize(
    ("container", "place"),
    [
        (box("app", FAR, rootless=True), ("127.0.0.1", 8443, "rootless")),
        (box("app", FAR, rootless=True, labels=NAMED), ("127.0.0.1", 8443, "rootless")),
        (box("app", FAR, net("b"), rootless=True), ("198.51.100.2", 443, "rootless")),
        (box("app", FAR, labels=NAMED), ("198.51.100.2", 443, "not_local")),
        (box("app", FAR, rootless=True, mode="host"), ("127.0.0.1", 443, "host_network")),
    ],
    ids=["far", "named", "near", "root", "host"],
)
def test_container_of_a_rootless_engine_is_where_its_port_is_published(
    container: Container, place: tuple[str, int, str]
) -> None:
    """
    That goes before networks that can not be reached, whoever named one, and after one that can.
    """
    published = Published(80, "127.0.0.1", 8080), Published(443, "127.0.0.1", 8443)
    backend = only_backend(replace(container, published=published))

    assert place == (backend.address, backend.port, backend.detour)


@pytest.mark.parametrize("wishes", [labels(host="a.example.com"), NAMED], ids=["free", "named"])
def test_container_of_a_rootless_engine_that_publishes_nothing_is_told_to(
    wishes: dict[str, str],
) -> None:
    """
    No route leads into a network that can not be reached, and the problem says what would help.
    """
    published = (Published(80, "127.0.0.1", 8080),)
    container = box("app", FAR, rootless=True, labels=wishes, published=published)
    result = plan([container])

    assert () == result.routes
    (problem,) = result.problems
    assert "no-network" == problem.code
    assert problem.detail.endswith("publish port 443")


def test_exact_network_name_wins_over_a_suffix() -> None:
    """
    A network named exactly so is meant, whatever else ends like it.
    """
    networks = net("a_web"), net("web", "198.51.100.3")
    container = box("app", *networks, labels=labels(host="a.example.com", network="web"))

    assert "198.51.100.3" == only_backend(container).address
    assert [] == codes(container)


@pytest.mark.parametrize(
    ("container", "code"),
    [
        (box(labels=labels(host="a.example.com", network="zzz")), "unknown-network"),
        (box("app", net(reachable=False)), "no-network"),
        (box(networks=(), mode="none"), "no-network"),
        (box("app", net(address="")), "no-address"),
        (box(mode="container:id-gone"), "no-network"),
        (box(mode="container:id-app"), "no-network"),
    ],
    ids=["unknown", "unreachable", "none", "no address", "owner gone", "its own owner"],
)
def test_network_that_leads_nowhere_is_a_problem(container: Container, code: str) -> None:
    """
    Where there is no address to take there is a problem and no route.
    """
    result = plan([container])

    assert () == result.routes
    assert [code] == [p.code.value for p in result.problems]


def test_host_network_is_loopback() -> None:
    """
    A container in the host's network is where the router is.
    """
    assert "127.0.0.1" == only_backend(box(networks=(), mode="host")).address


def test_joined_network_is_its_owners() -> None:
    """
    A container in another one's network has that one's address, over any number of steps.
    """
    owner = box("owner", net(address="198.51.100.7"), labels={})
    middle = box("middle", labels={}, networks=(), mode="container:id-owner")
    container = box(networks=(), mode="container:id-middle")

    assert "198.51.100.7" == only_backend(container, owner, middle).address


@pytest.mark.parametrize(
    ("network", "addresses"),
    [
        (net(), ("198.51.100.2", "")),
        (net(address6="2001:db8::2"), ("198.51.100.2", "2001:db8::2")),
        (net(address="", address6="2001:db8::2"), ("2001:db8::2", "")),
    ],
)
def test_ipv4_comes_before_ipv6(network: Network, addresses: tuple[str, str]) -> None:
    """
    IPv6 is the second address beside IPv4, and the only one where there is no IPv4.
    """
    backend = only_backend(box("app", network))

    assert addresses == (backend.address, backend.address6)


@pytest.mark.parametrize(
    ("container", "detour"),
    [
        (box(), Detour.NONE),
        (box(networks=(), mode="host"), Detour.HOST_NETWORK),
        (box(rootless=True), Detour.ROOTLESS),
        (box("app", net(driver="macvlan", reachable=False)), Detour.MACVLAN),
        (box("app", net(driver="ipvlan", reachable=False)), Detour.IPVLAN),
        (box("app", net(driver="overlay", reachable=False)), Detour.OVERLAY),
        (box("app", net(internal=True)), Detour.INTERNAL_NETWORK),
        (box("app", net(reachable=False)), Detour.NOT_LOCAL),
        (box("app", net(), net("b")), Detour.SEVERAL_NETWORKS),
        (box("app", net(), net("b", driver="macvlan")), Detour.SEVERAL_NETWORKS),
        (box("app", net(), net("b", priority=-1)), Detour.NONE),
        (box("app", net(priority=1), net("b"), net("c")), Detour.NONE),
        (box("app", net(priority=1), net("b", priority=1)), Detour.SEVERAL_NETWORKS),
        (box("app", net(), net("b", priority=1)), Detour.SEVERAL_NETWORKS),
        (box("app", net(), net("b", internal=True, priority=1)), Detour.NONE),
        (box("app", net(), net("b", gateway="", gateway6="2001:db8::1")), Detour.NONE),
        (box("app", net(gateway="", priority=1), net("b")), Detour.SEVERAL_NETWORKS),
        (
            box("app", net(address="", address6="2001:db8::2", gateway6="2001:db8::1"), net("b")),
            Detour.NONE,
        ),
        (
            box("app", net(address="", address6="2001:db8::2"), net("b", gateway6="2001:db8::3")),
            Detour.SEVERAL_NETWORKS,
        ),
        (
            box("app", net(address6="2001:db8::2"), net("b", gateway="", gateway6="2001:db8::3")),
            Detour.SEVERAL_NETWORKS,
        ),
    ],
)
def test_detour_is_why_replies_may_not_come_back_here(container: Container, detour: Detour) -> None:
    """
    A detour is the first reason for which the way to strangers is not through the network taken.
    """
    container = replace(container, labels=labels(host="a.example.com", network="web"))

    assert detour == only_backend(container).detour


def test_joined_container_takes_the_detours_of_its_owner() -> None:
    """
    What counts is the network that the container lives in, not its own.
    """
    owner = box("owner", net(), net("b"), labels={})
    container = box(
        networks=(), mode="container:id-owner", labels=labels(host="a.b", network="web")
    )

    assert Detour.SEVERAL_NETWORKS == only_backend(container, owner).detour


def test_backends_of_one_host_keep_their_own_settings() -> None:
    """
    Containers of a pool may differ in how they want their connections.
    """
    plain = box("a")
    proxied = box("b", net(address="198.51.100.3"))
    proxied = replace(
        proxied,
        labels={**proxied.labels, "sniroute.client-ip": "nat", "sniroute.proxy-protocol": "v2"},
    )
    relayed = box("c", net(address="198.51.100.4"))
    relayed = replace(relayed, labels={**relayed.labels, "sniroute.handoff": "relay"})

    (route,) = plan([plain, proxied, relayed]).routes

    assert [("a", "", "off", "auto"), ("b", "nat", "v2", "auto"), ("c", "", "off", "relay")] == [
        (backend.name, backend.client_ip, backend.proxy_protocol, backend.handoff)
        for backend in route.backends
    ]


@pytest.mark.parametrize("key", ["client-ip", "proxy-protocol", "handoff"])
def test_backend_never_gets_its_connections_in_a_way_it_did_not_ask_for(key: str) -> None:
    """
    A container whose wish can not be read is left out of the pool; the others serve.
    """
    bad = box("b", net(address="198.51.100.3"))
    bad = replace(bad, labels={**bad.labels, f"sniroute.{key}": "v9"})

    assert "a" == only_backend(box("a"), bad).name
    assert [f"bad-{key}"] == codes(box("a"), bad)


def test_containers_of_one_host_form_a_pool() -> None:
    """
    Containers and static backends with one host are one route; one address occurs once.
    """
    static = Route("app.example.com", (Backend("s", "file", "203.0.113.9", 443),))
    a, b = box("a"), box("b", net(address="198.51.100.3"))
    same = box("c")

    (route,) = plan([b, same, a], [static]).routes

    assert ["a", "b", "s"] == [backend.name for backend in route.backends]


def test_paused_container_is_not_routed_to() -> None:
    """
    Neither its route nor its problems count; a container in its network is served there.
    """
    paused = box("paused", labels=labels(host="a.example.com", port="x"), paused=True)
    joined = box(networks=(), mode="container:id-paused")

    assert "198.51.100.2" == only_backend(joined, paused).address
    assert [] == codes(joined, paused)


def test_addresses_are_those_of_all_networks() -> None:
    """
    Both families of each network count, also of a paused container; the host's own does not.
    """
    boxes = [
        box("a", net("x"), net("y", "198.51.100.9", address6="2001:db8::2")),
        box("b", net("x"), paused=True),
        box("c", net("x", ""), mode="host"),
        box("d", net("x", "198.51.100.10"), paused=True),
    ]

    assert {"198.51.100.10", "198.51.100.2", "198.51.100.9", "2001:db8::2"} == addresses(boxes)


def test_diff_names_the_hosts_that_differ() -> None:
    """
    A difference is added, removed or changed hosts; a table has none to itself.
    """
    one, two = (Backend(str(n), "docker", f"198.51.100.{n}", 443) for n in (1, 2))
    old = pool([("a", one), ("b", one), ("c", one)])
    new = pool([("b", one), ("c", two), ("d", one)])

    assert Changes(added=("d",), removed=("a",), changed=("c",)) == diff(old, new)
    assert Changes((), (), ()) == diff(old, old)


def test_carry_keeps_only_the_silent_sources() -> None:
    """
    What silent sources said last is kept; what others said last is not.
    """
    docker, podman, new = (
        Backend(name, name, address, 443)
        for name, address in (
            ("docker", "198.51.100.1"),
            ("podman", "198.51.100.2"),
            ("new", "198.51.100.3"),
        )
    )
    served = pool([("a", docker), ("a", podman), ("b", docker), ("c", podman)])

    assert pool([("a", new), ("a", podman), ("c", podman)]) == carry(
        pool([("a", new)]), served, {"podman"}
    )


_good = st.builds(
    box,
    st.sampled_from("abcdef"),
    st.builds(
        net,
        st.sampled_from(["x", "y"]),
        st.integers(1, 250).map("198.51.100.{}".format),
        reachable=st.booleans(),
    ),
    labels=st.fixed_dictionaries(
        {"sniroute.host": st.sampled_from(["a.example.com", "*.example.com, *", "b.example.com"])},
        optional={
            "sniroute.port": st.sampled_from(["443", "x"]),
            "sniroute.proxy-protocol": st.sampled_from(["v1", "x"]),
            "sniroute.bad": st.just("1"),
        },
    ),
    ports=st.frozensets(st.sampled_from([80, 443, 8443])),
    mode=st.sampled_from(["x", "host", "container:id-a"]),
)
_boxes = st.lists(_good, max_size=6, unique_by=lambda container: container.id)


@given(_boxes.flatmap(lambda boxes: st.tuples(st.just(boxes), st.permutations(boxes))))
def test_order_of_containers_does_not_matter(
    orders: tuple[list[Container], list[Container]],
) -> None:
    """
    The same containers in another order give the same plan.
    """
    assert plan(orders[0]) == plan(orders[1])


@given(
    _boxes,
    st.dictionaries(
        st.text(max_size=8).map("sniroute.{}".format) | st.sampled_from(["sniroute.port"]),
        st.text(max_size=12),
        max_size=4,
    ),
)
def test_bad_container_changes_no_other_route(boxes: list[Container], bad: dict[str, str]) -> None:
    """
    Whatever the labels of one container are, as long as they give no host, the rest is as without.
    """
    bad.pop("sniroute.host", None)
    without = plan(boxes)
    beside = plan([*boxes, box("zzz", net(address="203.0.113.1"), labels=bad)])

    assert without.routes == beside.routes
    assert set(without.problems) == {p for p in beside.problems if p.container != "zzz"}


@given(_boxes, _boxes)
def test_diff_is_empty_exactly_for_equal_tables(
    some: list[Container], others: list[Container]
) -> None:
    """
    Two tables without a difference are the same table.
    """
    old, new = plan(some).routes, plan(others).routes

    assert (old == new) == (diff(old, new) == Changes((), (), ()))
