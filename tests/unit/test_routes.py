"""
Precedence: exact, then the longest wildcard, then the catch-all.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controller.core.routes import Backend, Route, RouteTable

BACKEND = Backend("app", "docker", "198.51.100.2", 443)


def table(*hosts: str) -> RouteTable:
    return RouteTable(1, [Route(host, (BACKEND,)) for host in hosts])


def found(routes: RouteTable, name: str) -> str | None:
    route = routes.find(name)
    return route.host if route else None


@pytest.mark.parametrize(
    ("name", "host"),
    [
        ("a.example.com", "a.example.com"),
        ("b.example.com", "*.example.com"),
        ("c.b.a.example.com", "*.a.example.com"),
        ("c.b.example.com", "*.example.com"),
        ("example.com", "*"),
        ("notexample.com", "*"),
        ("com", "*"),
    ],
)
def test_exact_then_longest_wildcard_then_catch_all(name: str, host: str) -> None:
    """
    The most specific pattern wins, at any depth; a wildcard does not stand for its own suffix.
    """
    routes = table("*", "*.example.com", "*.a.example.com", "a.example.com")

    assert host == found(routes, name)


def test_no_pattern_no_route() -> None:
    """
    Without a catch-all an unknown name has no route.
    """
    assert None is found(table("*.example.com"), "example.org")


def test_routes_come_by_host() -> None:
    """
    A table lists its routes in one order.
    """
    assert ["*", "a", "b"] == [route.host for route in table("b", "*", "a").routes]


@pytest.mark.parametrize(
    ("addresses", "from4", "from6"),
    [
        (("198.51.100.2", ""), "198.51.100.2", "198.51.100.2"),
        (("198.51.100.2", "2001:db8::2"), "198.51.100.2", "2001:db8::2"),
        (("2001:db8::2", ""), "2001:db8::2", "2001:db8::2"),
    ],
)
def test_clients_are_led_to_their_own_family(
    addresses: tuple[str, str], from4: str, from6: str
) -> None:
    """
    A backend is reached at the address of the client's family, else at the one it has.
    """
    address, address6 = addresses
    backend = Backend("app", "docker", address, 443, address6=address6)

    assert (from4, from6) == (backend.reached_from(4), backend.reached_from(6))


@pytest.mark.parametrize(
    ("source", "address", "lacks"),
    [
        ("docker", "198.51.100.2", False),
        ("docker", "198.51.100.3", True),
        ("podman", "198.51.100.2", True),
        ("file", "198.51.100.3", False),
    ],
)
def test_a_table_lacks_only_containers_of_which_it_is_told(
    source: str,
    address: str,
    lacks: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    """
    Silence of a source is no news, and the same address at another source is someone else.
    """
    alive = {"docker": ["198.51.100.2"], "podman": ()}

    assert lacks == RouteTable(1, [], (), alive).lacks(source, address)


_label = st.sampled_from("abc")
_name = st.lists(_label, min_size=1, max_size=4).map(".".join)
_host = _name | _name.map("*.{}".format) | st.just("*")


@given(st.sets(_host), _name)
def test_found_is_the_most_specific_of_all_that_match(hosts: set[str], name: str) -> None:
    """
    The answer is that of trying every pattern and taking the longest.
    """
    matching = [
        host
        for host in hosts
        if host in (name, "*") or (host.startswith("*.") and name.endswith(host[1:]))
    ]
    best = max(matching, key=lambda host: (host == name, len(host)), default=None)

    assert best == found(table(*hosts), name)
